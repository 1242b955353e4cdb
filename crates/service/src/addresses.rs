//! Who has how much at once: a count for each client address, given back by guards.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

/// Counts by address. A network of 64 bits is one IPv6 client, for that is the least that one gets.
#[derive(Clone, Debug)]
pub struct Addresses {
    /// Held for a look-up. Only addresses that have something are in it.
    counts: Arc<Mutex<HashMap<IpAddr, usize>>>,
    most: usize,
}

/// One of an address's places; dropping it gives it back.
#[derive(Debug)]
pub struct AddressGuard {
    addresses: Addresses,
    address: IpAddr,
}

fn client(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64)).into(),
        address => address,
    }
}

impl Addresses {
    /// Makes the count, with the most that one address may have at once; 0 for no bound.
    pub fn new(most: usize) -> Self {
        Addresses { counts: Arc::default(), most }
    }

    /// Takes one of the address's places; `None` when it has none left.
    pub fn enter(&self, address: IpAddr) -> Option<AddressGuard> {
        let address = client(address);
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(address).or_default();
        if self.most > 0 && *count >= self.most {
            return None;
        }
        *count += 1;
        Some(AddressGuard { addresses: self.clone(), address })
    }
}

impl Drop for AddressGuard {
    fn drop(&mut self) {
        let mut counts = self.addresses.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_address_has_its_places_and_no_more_and_leaves_nothing_behind() {
        let addresses = Addresses::new(2);
        let [one, other]: [IpAddr; 2] = ["10.0.0.1", "10.0.0.2"].map(|text| text.parse().unwrap());
        let held = [addresses.enter(one).unwrap(), addresses.enter("::ffff:10.0.0.1".parse().unwrap()).unwrap()];
        assert!(addresses.enter(one).is_none() && addresses.enter(other).is_some());
        drop(held);
        assert!(addresses.enter(one).is_some());
        assert!(addresses.counts.lock().unwrap().is_empty());
    }

    #[test]
    fn a_network_of_64_bits_is_one_client_and_0_is_no_bound() {
        let addresses = Addresses::new(1);
        let [one, same, other]: [IpAddr; 3] =
            ["2001:db8::1", "2001:db8::ffff:2", "2001:db8:0:1::1"].map(|text| text.parse().unwrap());
        let _held = addresses.enter(one).unwrap();
        assert!(addresses.enter(same).is_none() && addresses.enter(other).is_some());
        let free = Addresses::new(0);
        let all: Vec<_> = (0..1000).map(|_| free.enter(one)).collect();
        assert!(all.iter().all(Option::is_some));
    }
}
