//! How many retries the fleet can afford: a share of the traffic plus a floor, so that a failing fleet is not
//! finished off by its own retries.

use std::time::Duration;

use words::Moment;

/// A token bucket: each request deposits `ratio`, time deposits `floor_per_second`, each retry takes one.
#[derive(Clone, Debug)]
pub struct RetryBudget {
    ratio: f64,
    floor_per_second: f64,
    balance: f64,
    most: f64,
    refilled: Moment,
}

impl RetryBudget {
    /// Makes a full budget. It never holds more than ten seconds' floor, or ten requests' worth.
    pub fn new(now: Moment, ratio: f64, floor_per_second: f64) -> Self {
        let most = (floor_per_second * 10.0).max(1.0) + ratio * 10.0;
        RetryBudget { ratio, floor_per_second, balance: most, most, refilled: now }
    }

    /// Counts a request in.
    pub fn deposit(&mut self) {
        self.balance = (self.balance + self.ratio).min(self.most);
    }

    /// Takes one retry out; `false` when there is none left.
    pub fn withdraw(&mut self, now: Moment) -> bool {
        let passed: Duration = now.since(self.refilled);
        self.refilled = now;
        self.balance = (self.balance + passed.as_secs_f64() * self.floor_per_second).min(self.most);
        if self.balance < 1.0 {
            return false;
        }
        self.balance -= 1.0;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_stay_a_share_of_the_traffic_above_the_floor() {
        let mut budget = RetryBudget::new(Moment::ZERO, 0.1, 1.0);
        let mut retries = 0;
        for _ in 0..10_000 {
            budget.deposit();
            retries += u32::from(budget.withdraw(Moment::ZERO));
        }
        assert!((1_000..=1_011).contains(&retries), "{retries}");
        let later = Moment::after_start(Duration::from_secs(3));
        let refilled = (0..10).filter(|_| budget.withdraw(later)).count();
        assert_eq!(refilled, 3, "the floor comes back with time");
    }
}
