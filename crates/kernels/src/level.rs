//! Which instructions run. All levels give the same bits; only their speed differs.

use std::fmt;

/// A set of instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What every machine has.
    Portable,
    /// AVX2 with FMA and F16C: x86-64-v3.
    Avx2,
    /// AVX-512 F, BW and VL, with VNNI.
    Avx512,
}

impl Level {
    /// All levels, lowest first.
    pub const ALL: [Level; 3] = [Level::Portable, Level::Avx2, Level::Avx512];

    /// Returns whether this machine has the instructions.
    pub fn is_available(self) -> bool {
        match self {
            Level::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => is_x86_feature_detected!("avx2") && has_floats(),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
                    && has_floats()
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// Returns the highest level of this machine.
    pub fn best() -> Level {
        Level::ALL.into_iter().rfind(|level| level.is_available()).unwrap_or(Level::Portable)
    }

    /// Returns this level.
    ///
    /// # Panics
    /// When this machine lacks it: to go on would be undefined.
    pub(crate) fn checked(self) -> Level {
        assert!(self.is_available(), "this machine has no {self}");
        self
    }

    /// Reads a level's name, as [`Level`] prints it; `None` for an unknown one.
    pub fn parse(name: &str) -> Option<Level> {
        Level::ALL.into_iter().find(|level| level.to_string() == name)
    }
}

#[cfg(target_arch = "x86_64")]
fn has_floats() -> bool {
    is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
        })
    }
}
