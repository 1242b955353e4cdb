//! NVIDIA's devices, as the driver's own files and its `nvidia-smi` tell of them; no call into the driver.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::Finding;
use crate::options::Options;

/// The compute capability that the kernels of this build are for, such as `89`, where the build named one.
pub(super) const BUILT_FOR: Option<&str> = option_env!("CUDA_COMPUTE_CAP");
/// Longest wait for `nvidia-smi`: a sick GPU may hold it for ever.
const SMI_MAX: Duration = Duration::from_secs(10);
/// What is asked of it.
const SMI: [&str; 2] = ["--query-gpu=name,memory.total,memory.free,compute_cap", "--format=csv,noheader,nounits"];
/// GPUs that are listed.
const GPUS_MAX: usize = 64;

/// One GPU, as `nvidia-smi` lists it.
#[derive(Debug, PartialEq)]
struct Gpu {
    name: String,
    memory_mib: u64,
    free_mib: u64,
    /// Such as `89`.
    compute: String,
}

fn parse(line: &str) -> Option<Gpu> {
    let fields: Vec<&str> = line.split(',').map(str::trim).collect();
    let [name, memory, free, compute] = fields[..] else { return None };
    let compute = compute.replace('.', "");
    Some(Gpu { name: name.into(), memory_mib: memory.parse().ok()?, free_mib: free.parse().ok()?, compute })
}

/// Runs `nvidia-smi`, within its bound.
fn smi() -> Option<Vec<Gpu>> {
    let mut command = Command::new("nvidia-smi");
    command.args(SMI).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().ok()?;
    let until = Instant::now() + SMI_MAX;
    while Instant::now() < until {
        match child.try_wait() {
            Ok(None) => std::thread::sleep(Duration::from_millis(20)),
            Ok(Some(status)) if status.success() => {
                let output = child.wait_with_output().ok()?;
                let text = String::from_utf8_lossy(&output.stdout);
                return Some(text.lines().take(GPUS_MAX).filter_map(parse).collect());
            }
            _ => break,
        }
    }
    let _ = child.kill();
    let _ = child.wait();
    None
}

/// Bytes of all GPUs' memory that are free now, where models go there; `None` elsewhere.
pub(super) fn free(options: &Options) -> Option<u64> {
    let on_cpu = |device: Option<&str>| device == Some("cpu");
    let wanted = options.entries().any(|model| !on_cpu(model.device.as_deref())) || options.entries().next().is_none();
    if !cfg!(feature = "cuda") || !wanted {
        return None;
    }
    let gpus = smi().filter(|gpus| !gpus.is_empty())?;
    Some(gpus.iter().fold(0, |sum: u64, gpu| sum.saturating_add(gpu.free_mib << 20)))
}

/// The driver's version, from the words of its kernel module.
fn driver(text: &str) -> Option<&str> {
    let after = text.lines().next()?.split("Kernel Module").nth(1)?;
    after.split_whitespace().find(|word| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit()))
}

/// Returns the package whose kernels are for a compute capability.
fn package(compute: &str) -> Option<&'static str> {
    match compute {
        "86" => Some("cortex-neuron-ampere"),
        "89" => Some("cortex-neuron-ada"),
        "90" => Some("cortex-neuron-hopper"),
        "120" => Some("cortex-neuron-blackwell"),
        _ => None,
    }
}

/// Says whether this build fits a GPU.
fn fits(number: usize, gpu: &Gpu, cuda: bool, built_for: Option<&str>) -> Finding {
    let what = format!("gpu {number}");
    let capability = match gpu.compute.split_at_checked(gpu.compute.len().saturating_sub(1)) {
        Some((major, minor)) => format!("{major}.{minor}"),
        None => gpu.compute.clone(),
    };
    let Gpu { name, memory_mib, free_mib, .. } = gpu;
    let found = format!("{name}, {free_mib} of {memory_mib} MiB free, compute capability {capability}");
    let Some(package) = package(&gpu.compute) else {
        let advice =
            format!("no package is made for it; build with --features cuda and CUDA_COMPUTE_CAP={}", gpu.compute);
        return if cuda && built_for == Some(&gpu.compute) {
            Finding::ok(&what, found)
        } else {
            Finding::warning(&what, found, advice)
        };
    };
    match built_for {
        _ if !cuda => Finding::warning(&what, found, format!("this build does not use it; install {package}")),
        Some(built) if built != gpu.compute => {
            Finding::fault(&what, found, format!("this build is for another one, sm_{built}; dnf swap to {package}"))
        }
        _ => Finding::ok(&what, found),
    }
}

/// Looks for the driver, its devices, and whether this build is for them.
pub(super) fn look(system: &Path, options: &Options) -> Vec<Finding> {
    let cuda = cfg!(feature = "cuda");
    let wants = options.entries().any(|model| model.device.as_deref().is_some_and(|d| d.starts_with("cuda")));
    let version = std::fs::read_to_string(system.join("proc/driver/nvidia/version")).unwrap_or_default();
    let Some(version) = driver(&version) else {
        let found = "no NVIDIA driver is loaded";
        let advice = "install the driver, or see why its module is not loaded: dmesg | grep -i nvidia";
        return vec![match (cuda, wants) {
            (_, true) => Finding::fault("driver", found, format!("a model wants a CUDA device: {advice}")),
            (true, false) => Finding::warning("driver", format!("{found}; models run on the CPU"), advice),
            (false, false) => Finding::ok("driver", format!("{found}; models run on the CPU")),
        }];
    };
    let mut findings = vec![Finding::ok("driver", format!("NVIDIA {version}"))];
    if !cuda && wants {
        let advice = "install the package of the GPU's kind, or set the model's device to 'cpu'";
        findings.push(Finding::fault("cuda", "a model wants a CUDA device, and this build has no CUDA", advice));
    }
    let control = system.join("dev/nvidiactl");
    if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open(&control) {
        let found = format!("{} can't be opened: {error}", control.display());
        let advice = "run nvidia-modprobe -c 0 -u, and let this user into the group of the device";
        findings.push(if cuda { Finding::fault("devices", found, advice) } else { Finding::ok("devices", found) });
        return findings;
    }
    match smi() {
        Some(gpus) => {
            findings.extend(gpus.iter().enumerate().map(|(i, gpu)| fits(i, gpu, cuda, BUILT_FOR)));
        }
        None => findings.push(Finding::warning(
            "gpus",
            "nvidia-smi is not here, or does not answer: memory and kind are not known",
            "install the driver's tools, and run nvidia-smi by hand",
        )),
    }
    findings
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::check::Level;
    use crate::options::ModelEntry;

    #[test]
    fn a_build_for_another_gpu_is_a_fault_that_names_the_right_package() {
        let gpu = parse("NVIDIA GeForce RTX 4090, 24564, 24000, 8.9").unwrap();
        assert_eq!((gpu.memory_mib, gpu.free_mib, gpu.compute.as_str()), (24_564, 24_000, "89"));
        assert_eq!(fits(0, &gpu, true, Some("89")).level, Level::Ok);
        let other = fits(0, &gpu, true, Some("90"));
        assert!(other.level == Level::Fault && other.advice.unwrap().contains("cortex-neuron-ada"));
        let cpu = fits(0, &gpu, false, None);
        assert!(cpu.level == Level::Warning && cpu.found.contains("compute capability 8.9"), "{cpu:?}");
        let odd = Gpu { compute: "75".into(), ..gpu };
        assert_eq!(fits(0, &odd, false, None).level, Level::Warning);
        assert_eq!(fits(0, &odd, true, Some("75")).level, Level::Ok);
        assert_eq!(parse("No devices were found"), None);
    }

    #[test]
    fn the_driver_is_told_by_its_modules_words() {
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs)\nGCC 13\n";
        let closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n";
        assert_eq!((driver(open), driver(closed), driver("")), (Some("580.65.06"), Some("550.54.15"), None));
    }

    #[test]
    fn without_a_driver_only_a_model_that_wants_cuda_is_a_fault() {
        let empty = tempfile::tempdir().unwrap();
        let entry = ModelEntry { id: "m".into(), device: Some("cuda:1".into()), ..ModelEntry::default() };
        let wanting = Options { default_models: vec![entry], ..Options::default() };
        assert_eq!(look(empty.path(), &wanting)[0].level, Level::Fault);
        let expected = if cfg!(feature = "cuda") { Level::Warning } else { Level::Ok };
        assert_eq!(look(empty.path(), &Options::default())[0].level, expected);
    }
}
