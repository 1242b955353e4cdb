//! Long runs against real processes: what clients see while workers are killed or restarted under them, or swap models.

mod kill;
mod load;
mod rollout;
mod swap;

pub use kill::{KillOptions, kill};
pub use load::{Load, Tally};
pub use rollout::{RolloutOptions, rollout};
pub use swap::{SwapOptions, swap};

use std::time::Duration;

use anyhow::{Context, Result};

/// CPU seconds that this process and the children it has waited for have used.
///
/// # Errors
/// When the system does not say.
pub fn cpu_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let rest = stat.rsplit_once(')').context("/proc/self/stat")?.1;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    // utime, stime, cutime, cstime: fields 14 to 17 of proc(5), in clock ticks.
    let ticks: u64 = fields[11..15].iter().map(|field| field.parse::<u64>().unwrap_or(0)).sum();
    Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// Returns the `share` quantile of sorted spans, in milliseconds.
pub fn quantile_ms(sorted: &[Duration], share: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * share).round() as usize).map_or(f64::NAN, |span| span.as_secs_f64() * 1000.0)
}
