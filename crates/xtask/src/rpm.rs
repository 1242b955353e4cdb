//! The packages: binaries that are there, or are built first, into RPMs by the specs in `rpm/`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::{cargo, root, run};

/// The worker's flavours, and the compute capability of each.
pub(crate) const FLAVOURS: [(&str, Option<&str>); 5] =
    [("cpu", None), ("ampere", Some("86")), ("ada", Some("89")), ("hopper", Some("90")), ("blackwell", Some("120"))];

/// What is packaged, and from what.
#[derive(Debug, Args)]
pub(crate) struct RpmArgs {
    /// Where the packages go.
    #[arg(long, default_value = "target/rpm")]
    out: PathBuf,
    /// The profile to build with; packages for others are built with 'release'.
    #[arg(long, default_value = "release")]
    profile: String,
    /// A folder with 'cortex' and 'neuron' (the cpu flavour), built before; nothing is built then.
    #[arg(long)]
    bin_dir: Option<PathBuf>,
    /// A worker that was built for a GPU, such as ada=dist/neuron-ada; again for each flavour.
    #[arg(long = "artefact", value_name = "FLAVOUR=FILE", value_parser = artefact)]
    artefacts: Vec<(String, PathBuf)>,
    /// The root of the sources whose `deploy/` is packaged.
    #[arg(long, default_value_os_t = root())]
    sources: PathBuf,
    /// Print the release and make nothing.
    #[arg(long)]
    print_release: bool,
    /// Name the release 0.1.DATEgitSHORTSHA, which a stable one, 1, comes after.
    #[arg(long)]
    prerelease: bool,
    /// The release, in place of 1 and of what --prerelease says.
    #[arg(long, conflicts_with = "prerelease")]
    release: Option<String>,
}

fn artefact(text: &str) -> Result<(String, PathBuf), String> {
    let (flavour, file) = text.split_once('=').ok_or("expected FLAVOUR=FILE")?;
    let gpu = FLAVOURS.iter().any(|(name, compute)| *name == flavour && compute.is_some());
    let names: Vec<&str> = FLAVOURS.iter().filter(|(_, compute)| compute.is_some()).map(|(name, _)| *name).collect();
    if !gpu {
        return Err(format!("there is no GPU flavour '{flavour}'; there are {}", names.join(", ")));
    }
    Ok((flavour.into(), file.into()))
}

/// Returns what a command prints, trimmed.
fn said(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    ensure!(output.status.success(), "{command:?} failed: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.trim().to_string())
}

/// Returns the release: `0.1.20260131gitabc1234` sorts before `1`.
fn release(args: &RpmArgs) -> Result<String> {
    if let Some(release) = &args.release {
        return Ok(release.clone());
    }
    if !args.prerelease {
        return Ok("1".into());
    }
    let git = |arguments: &[&str]| said(Command::new("git").current_dir(root()).args(arguments));
    let date = git(&["show", "-s", "--format=%cd", "--date=format:%Y%m%d", "HEAD"])?;
    let commit = git(&["rev-parse", "--short=7", "HEAD"])?;
    Ok(format!("0.1.{date}git{commit}"))
}

/// Builds the gateway and the worker's cpu flavour; returns the folder that they are in.
fn build(profile: &str) -> Result<PathBuf> {
    run(cargo().args(["build", "--locked", "--profile", profile, "-p", "cortex", "-p", "neuron"]))?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    Ok(target.join(if profile == "dev" { "debug" } else { profile }))
}

/// One package to make.
struct Package<'a> {
    spec: &'a str,
    flavour: Option<&'a str>,
    binary: PathBuf,
}

/// Runs rpmbuild on one package.
fn package(package: &Package, sources: &Path, out: &Path, pages: &Path, release: &str) -> Result<()> {
    let define = |name: &str, value: &str| ["--define".to_string(), format!("{name} {value}")];
    let binary = package.binary.canonicalize().with_context(|| package.binary.display().to_string())?;
    let (sources, top) = (sources.canonicalize()?, out.join("build"));
    let mut command = Command::new("rpmbuild");
    command.args(["-bb", "--quiet"]).arg(root().join("rpm").join(package.spec));
    for (name, value) in [
        ("_topdir", top.display().to_string()),
        ("_rpmdir", out.display().to_string()),
        ("_rpmfilename", "%%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm".into()),
        ("binary", binary.display().to_string()),
        ("pages", pages.display().to_string()),
        ("repository", sources.display().to_string()),
        ("version_text", env!("CARGO_PKG_VERSION").into()),
        ("release_text", release.into()),
        ("packager", "The authors of cortex".into()),
        // What every supported rpm reads; the default of newer ones is not.
        ("_binary_payload", "w3.zstdio".into()),
    ] {
        command.args(define(name, &value));
    }
    if let Some(flavour) = package.flavour {
        command.args(define("flavour", flavour));
    }
    run(&mut command)
}

/// Makes all packages that there are binaries for.
#[allow(clippy::print_stdout)]
pub(crate) fn make(args: &RpmArgs) -> Result<()> {
    let release = release(args)?;
    if args.print_release {
        println!("{release}");
        return Ok(());
    }
    if Command::new("rpmbuild").arg("--version").output().is_err() {
        bail!("rpmbuild is not here; bash rpm/tools.sh installs what packaging needs");
    }
    let binaries = match &args.bin_dir {
        Some(folder) => folder.clone(),
        None => build(&args.profile)?,
    };
    std::fs::create_dir_all(&args.out)?;
    let out = args.out.canonicalize()?;
    let pages = out.join("build/pages");
    for program in ["cortex", "neuron"] {
        // The pages are the same for all flavours, and this one runs on any machine.
        run(Command::new(binaries.join(program)).arg("pages").arg(pages.join(program)))?;
    }
    let mut packages = vec![
        Package { spec: "cortex-gateway.spec", flavour: None, binary: binaries.join("cortex") },
        Package { spec: "cortex-neuron.spec", flavour: Some("cpu"), binary: binaries.join("neuron") },
    ];
    for (flavour, binary) in &args.artefacts {
        packages.push(Package { spec: "cortex-neuron.spec", flavour: Some(flavour), binary: binary.clone() });
    }
    for entry in &packages {
        let program = if entry.flavour.is_some() { "neuron" } else { "cortex" };
        package(entry, &args.sources, &out, &pages.join(program), &release)?;
        let name = entry.flavour.map_or("cortex-gateway".to_string(), |flavour| format!("cortex-neuron-{flavour}"));
        println!("{name} {}-{release}", env!("CARGO_PKG_VERSION"));
    }
    let made: Vec<&str> = packages.iter().filter_map(|package| package.flavour).collect();
    let missing = FLAVOURS.iter().map(|(name, _)| *name).filter(|name| !made.contains(name));
    let missing: Vec<&str> = missing.collect();
    if !missing.is_empty() {
        println!("not made, as no --artefact names a binary: {}", missing.join(", "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_artefact_is_of_a_gpu_flavour_that_there_is() {
        assert_eq!(artefact("ada=a/b").unwrap(), ("ada".into(), PathBuf::from("a/b")));
        assert!(artefact("ada").is_err() && artefact("cpu=a").is_err());
        assert!(artefact("volta=a").unwrap_err().contains("ampere, ada, hopper, blackwell"));
    }

    #[test]
    fn flavours_and_capabilities_are_the_same_wherever_they_are_named() {
        let read = |name: &str| std::fs::read_to_string(root().join(name)).unwrap();
        let (build, check) = (read("rpm/cuda.sh"), read("crates/neuron/src/check/gpu.rs"));
        let workflows = ["prerelease", "release"].map(|name| read(&format!(".gitea/workflows/{name}.yml")));
        for (flavour, compute) in FLAVOURS {
            let Some(compute) = compute else { continue };
            assert!(build.contains(&format!("{flavour}) capability={compute} ;;")), "{flavour}");
            assert!(check.contains(&format!("\"{compute}\" => Some(\"cortex-neuron-{flavour}\")")), "{flavour}");
            assert!(workflows.iter().all(|text| text.contains(flavour)), "{flavour}");
        }
    }

    #[test]
    fn each_flavour_conflicts_with_all_others() {
        let spec = std::fs::read_to_string(root().join("rpm/cortex-neuron.spec")).unwrap();
        for (flavour, _) in FLAVOURS {
            let guarded =
                format!("%if \"%{{flavour}}\" != \"{flavour}\"\nConflicts:      cortex-neuron-{flavour}\n%endif\n");
            assert!(spec.contains(&guarded), "{flavour}");
        }
        assert_eq!(spec.matches("\nConflicts:").count(), FLAVOURS.len());
    }
}
