//! What a worker needs of its machine: cores, memory, ports, the token, folders, programs.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

use super::Finding;
use crate::activation::spec_of;
use crate::node;
use crate::options::Options;

/// Disk that a download leaves free: `hub::Limits` says so.
fn disk_reserve() -> u64 {
    hub::Limits::default().disk_reserve
}

pub(super) fn cores() -> Finding {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = flags.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let known = ["avx2", "avx512_vnni"].into_iter().filter(|name| flags.split_whitespace().any(|flag| flag == *name));
    let known: Vec<&str> = known.collect();
    let instructions =
        if known.is_empty() { "no vector instructions that the kernels use".into() } else { known.join(" ") };
    Finding::ok("cpu", format!("{cores} cores for this process; {instructions}"))
}

/// Bytes of `MemAvailable` and `MemTotal`.
fn available(meminfo: &str) -> Option<(u64, u64)> {
    let of = |name: &str| {
        let line = meminfo.lines().find(|line| line.starts_with(name))?;
        Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? << 10)
    };
    Some((of("MemAvailable:")?, of("MemTotal:")?))
}

/// Bytes of the host's memory that are free now.
pub(super) fn free() -> Option<u64> {
    available(&std::fs::read_to_string("/proc/meminfo").ok()?).map(|(free, _)| free)
}

pub(super) fn memory(system: &Path) -> Finding {
    let text = std::fs::read_to_string(system.join("proc/meminfo")).unwrap_or_default();
    match available(&text) {
        Some((available, total)) => {
            Finding::ok("memory", format!("{} of {} MiB available", available >> 20, total >> 20))
        }
        None => Finding::warning("memory", "how much there is is not known", "mount /proc"),
    }
}

fn port(what: &str, key: &str, bind: SocketAddr) -> Finding {
    match TcpListener::bind(bind) {
        Ok(_) => Finding::ok(what, format!("{bind} is free")),
        Err(error) => {
            let advice = match error.kind() {
                ErrorKind::AddrInUse => {
                    format!("fine if it is this worker that runs; else see who: ss -ltnp 'sport = :{}'", bind.port())
                }
                ErrorKind::AddrNotAvailable => format!("set {key} to an address of this machine: ip address"),
                ErrorKind::PermissionDenied => format!("set {key} to a port from 1024 on"),
                _ => format!("set {key} to an address that can be bound"),
            };
            Finding::fault(what, format!("{bind} can't be bound: {error}"), advice)
        }
    }
}

pub(super) fn ports(options: &Options) -> [Finding; 2] {
    [port("data port", "data.bind", options.data.bind), port("control port", "control.bind", options.control.bind)]
}

/// Whether gateways that may give orders can send requests too.
pub(super) fn reach(options: &Options) -> Option<Finding> {
    let advice = "set data.bind to an address of this machine, or data.advertise to one that leads here";
    options.unreachable_data().map(|found| Finding::warning("data port", found, advice))
}

pub(super) fn token(options: &Options) -> Finding {
    let advice = "openssl rand -hex 32 > FILE, name it in control.token_file, and let this user read it";
    match (node::guard_control(options), &options.control.token_file) {
        (Err(error), _) => Finding::fault("token", error.to_string(), advice),
        (Ok(_), None) => Finding::ok("token", "none, and none is needed: the control port is on loopback"),
        (Ok(_), Some(path)) => {
            let open = std::fs::metadata(path).is_ok_and(|file| file.permissions().mode() & 0o007 != 0);
            let found = path.display().to_string();
            match open {
                true => Finding::warning("token", format!("{found} is open to everybody"), format!("chmod o= {found}")),
                false => Finding::ok("token", found),
            }
        }
    }
}

/// Returns the folder itself, or the one above it that is there.
fn nearest(folder: &Path) -> PathBuf {
    folder.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("/")).into()
}

fn writable(folder: &Path) -> Result<PathBuf, String> {
    let there = nearest(folder);
    if !there.is_dir() {
        return Err(format!("{} is no folder", there.display()));
    }
    match access(&there, Access::WRITE_OK | Access::EXEC_OK) {
        Ok(()) => Ok(there),
        Err(error) => Err(format!("{} can't be written to: {error}", there.display())),
    }
}

pub(super) fn state(options: &Options) -> Finding {
    let Some(folder) = &options.node.state_dir else {
        let found = "none: cordons, drains and rollouts are refused, and breadcrumbs are not kept";
        return Finding::warning("state folder", found, "set node.state_dir");
    };
    let advice = "set node.state_dir to a folder of this user's";
    let whole = writable(folder).and_then(|_| {
        let record = crate::state_dir::StateDir::new(folder).read_record();
        record.map(|_| ()).map_err(|error| format!("what the life before left can't be read: {error}"))
    });
    match whole {
        Ok(()) if folder.exists() => Finding::ok("state folder", folder.display().to_string()),
        Ok(()) => Finding::ok("state folder", format!("{} will be made", folder.display())),
        Err(problem) => Finding::fault("state folder", problem, advice),
    }
}

pub(super) fn cache(folder: Option<&Path>, options: &Options) -> Finding {
    let from_hubs = options.entries().filter_map(|entry| spec_of(entry).ok());
    let needed = from_hubs.filter(|spec| spec.reference.is_some()).count() > 0;
    let fault = |found: String, advice: &str| match needed {
        true => Finding::fault("cache folder", found, advice),
        false => Finding::warning("cache folder", found, advice),
    };
    let advice = "set harness.candle.hf_cache, or HF_HUB_CACHE, to a folder of this user's";
    let Some(folder) = folder else { return fault("none is known: HOME is not set".into(), advice) };
    let there = match writable(folder) {
        Ok(there) => there,
        Err(problem) => return fault(problem, advice),
    };
    let free = rustix::fs::statvfs(&there).map(|facts| facts.f_bavail.saturating_mul(facts.f_frsize));
    let found = format!("{}, {} MiB free", folder.display(), free.unwrap_or_default() >> 20);
    match free {
        Ok(free) if free > disk_reserve() => Finding::ok("cache folder", found),
        _ => {
            let advice = format!("make room: a download leaves {} MiB free", disk_reserve() >> 20);
            fault(found, &advice)
        }
    }
}

/// Looks whether this user can run a program as a command would, from `directory` where it has its own.
///
/// # Errors
/// What stands in the way, in words.
pub(super) fn runnable(program: &str, directory: Option<&Path>) -> Result<(), String> {
    let file = |path: PathBuf| path.is_file().then_some(path);
    let found = match program.contains('/') {
        true => file(directory.unwrap_or(Path::new("")).join(program)),
        false => {
            let folders = std::env::var_os("PATH").unwrap_or_default();
            let mut all = std::env::split_paths(&folders).filter_map(|folder| file(folder.join(program)));
            all.find(|path| access(path, Access::EXEC_OK).is_ok())
        }
    };
    let path = found.ok_or_else(|| format!("there is no program '{program}'"))?;
    access(&path, Access::EXEC_OK).map_err(|_| format!("'{program}' may not be run; is it executable?"))
}

pub(super) fn upgrades(options: &Options) -> Vec<Finding> {
    let look = |(name, upgrade): (&String, &crate::options::UpgradeOptions)| {
        let (what, program) = (format!("upgrade {name}"), upgrade.argv.first()?);
        let advice = format!("install it, or correct upgrade.{name}.argv");
        Some(match runnable(program, None) {
            Ok(()) => Finding::ok(&what, program.clone()),
            Err(problem) => Finding::warning(&what, problem, advice),
        })
    };
    options.upgrade.iter().filter_map(look).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::check::Level;
    use crate::options::{ModelEntry, UpgradeOptions};

    #[test]
    fn a_port_that_is_taken_is_a_fault_and_a_free_one_is_not() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let finding = port("data port", "data.bind", taken.local_addr().unwrap());
        assert!(finding.level == Level::Fault && finding.advice.unwrap().contains("ss -ltnp"));
        assert_eq!(port("data port", "data.bind", "127.0.0.1:0".parse().unwrap()).level, Level::Ok);
        let mut options = Options::default();
        assert!(reach(&options).is_none(), "all on loopback");
        options.control.bind = "0.0.0.0:13231".parse().unwrap();
        assert_eq!(reach(&options).unwrap().level, Level::Warning);
        options.data.advertise = Some("gpu1:13131".into());
        assert!(reach(&options).is_none());
        let elsewhere = port("data port", "data.bind", "192.0.2.1:1".parse().unwrap());
        assert!(elsewhere.advice.unwrap().contains("data.bind"));
    }

    #[test]
    fn a_control_port_outside_loopback_needs_a_token_that_others_cannot_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        std::fs::write(&path, "0123456789abcdef").unwrap();
        let mode = |mode: u32| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        let mut options = Options::default();
        assert_eq!(token(&options).level, Level::Ok);
        options.control.bind = "0.0.0.0:13231".parse().unwrap();
        assert_eq!(token(&options).level, Level::Fault);
        options.control.token_file = Some(path.clone());
        mode(0o644);
        assert_eq!(token(&options).level, Level::Warning);
        mode(0o640);
        assert_eq!(token(&options).level, Level::Ok);
    }

    #[test]
    fn folders_that_will_be_made_are_fine_and_files_in_their_place_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let mut options = Options::default();
        assert_eq!(state(&options).level, Level::Warning);
        options.node.state_dir = Some(folder.path().join("a/b"));
        assert_eq!(state(&options).level, Level::Ok);
        std::fs::write(folder.path().join("a"), "a file").unwrap();
        assert_eq!(state(&options).level, Level::Fault);
        std::fs::write(folder.path().join("intent.json"), "{").unwrap();
        options.node.state_dir = Some(folder.path().into());
        assert_eq!(state(&options).level, Level::Fault);

        let none = Options::default();
        assert_eq!(cache(None, &none).level, Level::Warning);
        assert_eq!(cache(Some(folder.path()), &none).level, Level::Ok);
        let entry = ModelEntry { id: "org/repo".into(), ..ModelEntry::default() };
        let wanting = Options { default_models: vec![entry], ..Options::default() };
        assert_eq!(cache(None, &wanting).level, Level::Fault);
    }

    #[test]
    fn memory_and_programs_are_looked_up() {
        assert_eq!(available("MemTotal: 4 kB\nMemFree: 1 kB\nMemAvailable: 2 kB\n"), Some((2048, 4096)));
        let upgrade = |program: &str| UpgradeOptions { argv: vec![program.into()], ..UpgradeOptions::default() };
        let mut options = Options::default();
        options.upgrade.insert("a".into(), upgrade("sh"));
        options.upgrade.insert("b".into(), upgrade("/nowhere/program"));
        let levels: Vec<Level> = upgrades(&options).iter().map(|finding| finding.level).collect();
        assert_eq!(levels, [Level::Ok, Level::Warning]);
    }
}
