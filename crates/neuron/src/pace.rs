//! The time between two tokens of one model, as its gateways need to know it: a 99th percentile that follows change.

use std::time::Duration;

/// Buckets, each a quarter longer than the one before; the first ends at 1 ms, the last at about 2 minutes.
const BUCKETS: usize = 54;
const GROWTH: f64 = 1.25;
/// Samples after which old ones weigh half.
const HALF_LIFE: u32 = 4096;

/// A histogram whose past fades.
#[derive(Clone, Debug)]
pub(crate) struct Pace {
    counts: [u32; BUCKETS],
    total: u32,
}

impl Default for Pace {
    fn default() -> Self {
        Pace { counts: [0; BUCKETS], total: 0 }
    }
}

impl Pace {
    /// Takes one sample.
    pub(crate) fn observe(&mut self, span: Duration) {
        let millis = span.as_secs_f64() * 1000.0;
        let bucket = if millis <= 1.0 { 0 } else { (millis.log(GROWTH).ceil() as usize).min(BUCKETS - 1) };
        self.counts[bucket] += 1;
        self.total += 1;
        if self.total >= HALF_LIFE {
            self.counts.iter_mut().for_each(|count| *count /= 2);
            self.total = self.counts.iter().sum();
        }
    }

    /// Returns the 99th percentile in milliseconds, rounded up to its bucket's end; 0 before there are samples.
    pub(crate) fn p99_ms(&self) -> u32 {
        let wanted = u64::from(self.total) * 99;
        let mut seen = 0u64;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += u64::from(*count) * 100;
            if *count > 0 && seen >= wanted {
                return GROWTH.powi(bucket as i32).ceil() as u32;
            }
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_percentile_is_within_a_bucket_and_forgets() {
        let mut pace = Pace::default();
        assert_eq!(pace.p99_ms(), 0);
        (0..990).for_each(|_| pace.observe(Duration::from_millis(20)));
        (0..10).for_each(|_| pace.observe(Duration::from_millis(400)));
        assert!((20..=25).contains(&pace.p99_ms()), "{}", pace.p99_ms());
        (0..20).for_each(|_| pace.observe(Duration::from_millis(400)));
        assert!((400..=500).contains(&pace.p99_ms()), "{}", pace.p99_ms());
        (0..20_000).for_each(|_| pace.observe(Duration::from_millis(3)));
        assert!(pace.p99_ms() <= 4, "{}", pace.p99_ms());
        pace.observe(Duration::from_secs(100_000));
        assert!(pace.p99_ms() > 0);
    }
}
