//! How an engine is sized, and what computes.

use candle_core::Device;
use kernels::kv::KvType;
use kernels::{Level, THREADS_MAX};

use crate::error::LoadError;
use crate::packed::BLOCK_TOKENS;

/// Where to compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// CUDA when compiled in and present, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// This CUDA device, or an error.
    Cuda(usize),
}

impl DeviceChoice {
    /// Reads `auto`, `cpu`, `cuda` or `cuda:N`.
    ///
    /// # Errors
    /// [`LoadError::Device`] for anything else.
    pub fn parse(text: &str) -> Result<Self, LoadError> {
        let number = |text: &str| text.parse().ok();
        match text {
            "auto" | "" => Ok(DeviceChoice::Auto),
            "cpu" => Ok(DeviceChoice::Cpu),
            "cuda" => Ok(DeviceChoice::Cuda(0)),
            _ => text.strip_prefix("cuda:").and_then(number).map(DeviceChoice::Cuda).ok_or_else(|| {
                LoadError::Device(format!("the device must be auto, cpu, cuda or cuda:N, it is '{text}'"))
            }),
        }
    }

    pub(crate) fn open(self) -> Result<Device, LoadError> {
        let cuda = candle_core::utils::cuda_is_available();
        match self {
            // Compiled in, and possibly not present: that is the CPU too.
            DeviceChoice::Auto if cuda => Ok(Device::new_cuda(0).unwrap_or(Device::Cpu)),
            DeviceChoice::Auto | DeviceChoice::Cpu => Ok(Device::Cpu),
            DeviceChoice::Cuda(_) if !cuda => {
                Err(LoadError::Device("this build has no CUDA; use a CUDA build, or the device 'cpu'".into()))
            }
            DeviceChoice::Cuda(number) => Device::new_cuda(number).map_err(LoadError::Candle),
        }
    }
}

/// How the kernels run. None of it but `kv` changes a bit of any result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelOptions {
    /// Threads, 1 to 256; the caller's own is one of them.
    pub threads: usize,
    /// How keys and values are rounded.
    pub kv: KvType,
    /// Instructions; where `None`, the machine's best that equal the portable kernels in a proof at the load.
    pub level: Option<Level>,
}

impl Default for KernelOptions {
    fn default() -> Self {
        KernelOptions { threads: 1, kv: KvType::F16, level: None }
    }
}

/// What computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// The kernels on the CPU, candle on CUDA.
    Auto(KernelOptions),
    /// candle everywhere.
    Candle,
}

/// How an engine is sized.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Where to compute.
    pub device: DeviceChoice,
    /// What computes.
    pub arithmetic: Arithmetic,
    /// Most bytes of KV.
    pub kv_bytes: usize,
    /// Tokens a KV block holds: 32 for the kernels.
    pub block_tokens: usize,
    /// Most rows in a batch.
    pub max_batch: usize,
    /// Most tokens in a batch.
    pub max_step_tokens: usize,
    /// Longest sequence; the model's own context bounds it too.
    pub context_length: Option<usize>,
}

/// Largest number of rows, tokens and the like in [`Options`].
const COUNT_MAX: usize = 1 << 20;

impl Options {
    pub(crate) fn check(&self) -> Result<(), LoadError> {
        let context = self.context_length.unwrap_or(1);
        let counts = [
            ("block_tokens", self.block_tokens),
            ("max_batch", self.max_batch),
            ("max_step_tokens", self.max_step_tokens),
        ];
        match counts.into_iter().find(|(_, value)| !(1..=COUNT_MAX).contains(value)) {
            Some((name, value)) => {
                Err(LoadError::Options(format!("{name} must be from 1 to {COUNT_MAX}, it is {value}")))
            }
            None if context == 0 => Err(LoadError::Options("context_length must be at least 1, it is 0".into())),
            None => Ok(()),
        }
    }

    /// Returns how the kernels run, or `None` where candle computes.
    pub(crate) fn kernels(&self, device: &Device) -> Result<Option<&KernelOptions>, LoadError> {
        let Arithmetic::Auto(kernels) = &self.arithmetic else { return Ok(None) };
        if !device.is_cpu() {
            return Ok(None);
        }
        if self.block_tokens != BLOCK_TOKENS {
            let given = self.block_tokens;
            return Err(LoadError::Options(format!(
                "block_tokens must be {BLOCK_TOKENS} for the kernels, it is {given}"
            )));
        }
        if !(1..=THREADS_MAX).contains(&kernels.threads) {
            let given = kernels.threads;
            return Err(LoadError::Options(format!("threads must be from 1 to {THREADS_MAX}, it is {given}")));
        }
        Ok(Some(kernels))
    }
}
