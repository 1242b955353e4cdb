//! The account of blocks and the cache below it, without a scheduler.
#![allow(clippy::unwrap_used)]
use super::*;
use proptest::prelude::*;

const SALT: [u8; 32] = [0; 32];

fn content(parent: Option<&PrefixBlock>, tokens: &[u32], block: BlockId) -> PrefixBlock {
    let parent = parent.map(|parent| parent.hash);
    let hash = prefix_hash(parent.as_ref(), &SALT, tokens.iter().copied());
    PrefixBlock { hash, parent, salt: SALT, tokens: tokens.to_vec(), block }
}

fn finds(ledger: &Ledger, known: &PrefixBlock) -> bool {
    ledger.find(&known.hash, known.parent.as_ref(), &known.salt, known.tokens.iter().copied()) == Some(known.block)
}

/// Publishes a chain of blocks of two tokens each, all beginning with `first`, and lets go of it.
fn chain(ledger: &mut Ledger, first: u32, count: u32) -> Vec<PrefixBlock> {
    let mut known: Vec<PrefixBlock> = Vec::new();
    for (i, block) in (0..count).zip(ledger.take(count as usize).unwrap()) {
        let next = content(known.last(), &[first, i], block);
        assert_eq!(ledger.publish(next.clone()), Publication::Published);
        known.push(next);
    }
    known.iter().rev().for_each(|known| ledger.release(known.block));
    known
}

#[test]
fn too_few_blocks_give_none_at_all() {
    let mut ledger = Ledger::new(4, 2);
    assert_eq!(ledger.take(5), None);
    let taken = ledger.take(3).unwrap();
    assert_eq!((ledger.used(), ledger.available(), ledger.take(2)), (3, 1, None));
    taken.into_iter().for_each(|block| ledger.release(block));
    assert_eq!((ledger.used(), ledger.cached(), ledger.available()), (0, 0, 4));
}

#[test]
fn a_shared_block_is_free_when_its_last_holder_lets_go() {
    let mut ledger = Ledger::new(2, 2);
    let block = ledger.take(1).unwrap()[0];
    ledger.share(block);
    ledger.release(block);
    assert_eq!((ledger.holders(block), ledger.used()), (1, 1));
    ledger.release(block);
    assert_eq!((ledger.holders(block), ledger.available()), (0, 2));
}

#[test]
fn the_cache_gives_way_from_the_end_of_the_chain_used_longest_ago() {
    let mut ledger = Ledger::new(6, 2);
    let (old, young) = (chain(&mut ledger, 1, 3), chain(&mut ledger, 2, 3));
    assert_eq!((ledger.used(), ledger.cached(), ledger.available()), (0, 6, 6));
    // The old chain's start is used once more, so its end is the older part now.
    ledger.share(old[0].block);
    ledger.release(old[0].block);
    let expected = [&old[2], &old[1], &young[2], &young[1], &young[0], &old[0]];
    for known in expected {
        assert!(finds(&ledger, known));
        assert_eq!(ledger.take(1), Some(vec![known.block]));
        assert!(!finds(&ledger, known));
        ledger.audit();
    }
    assert_eq!(ledger.take(1), None);
}

#[test]
fn a_collision_of_hashes_is_never_believed() {
    let mut ledger = Ledger::new(4, 2);
    let known = chain(&mut ledger, 7, 2);
    let with = |parent: Option<&PrefixHash>, salt: &[u8; 32], tokens: [u32; 2]| {
        ledger.find(&known[1].hash, parent, salt, tokens.into_iter())
    };
    assert_eq!(with(Some(&known[0].hash), &SALT, [7, 1]), Some(known[1].block));
    assert_eq!(with(Some(&known[0].hash), &SALT, [7, 2]), None, "other tokens");
    assert_eq!(with(None, &SALT, [7, 1]), None, "another parent");
    assert_eq!(with(Some(&known[0].hash), &[1; 32], [7, 1]), None, "another salt");
    let block = ledger.take(1).unwrap()[0];
    let forged = PrefixBlock { tokens: vec![8, 8], block, ..known[1].clone() };
    assert_eq!(ledger.publish(forged), Publication::Refused);
    let orphan = PrefixBlock { hash: [1; 32], parent: Some([2; 32]), salt: SALT, tokens: vec![1, 2], block };
    assert_eq!(ledger.publish(orphan), Publication::Refused, "nobody could find it");
    ledger.release(block);
    ledger.audit();
}

#[test]
fn of_equal_contents_the_first_is_found() {
    let mut ledger = Ledger::new(4, 2);
    let taken = ledger.take(2).unwrap();
    assert_eq!(ledger.publish(content(None, &[1, 2], taken[0])), Publication::Published);
    assert_eq!(ledger.publish(content(None, &[1, 2], taken[1])), Publication::Known(taken[0]));
    ledger.release(taken[1]);
    assert_eq!(ledger.cached(), 0, "the second is freed");
    ledger.release(taken[0]);
    assert_eq!(ledger.cached(), 1);
}

#[test]
fn an_import_takes_a_free_block_after_a_known_parent_and_is_the_first_to_go() {
    let mut ledger = Ledger::new(3, 2);
    assert_eq!(ledger.import(Some([9; 32]), SALT, vec![1, 2]), None, "an unknown parent");
    assert_eq!(ledger.import(None, SALT, vec![1]), None, "half a block");
    let (first, parent) = ledger.import(None, SALT, vec![1, 2]).unwrap();
    assert_eq!(ledger.import(None, SALT, vec![1, 2]), None, "known already");
    let (second, end) = ledger.import(Some(parent), SALT, vec![3, 4]).unwrap();
    assert_eq!(ledger.import(Some(parent), [1; 32], vec![3, 4]), None, "another salt");
    assert!(!ledger.forget(&parent), "it has a child");
    let used = chain(&mut ledger, 5, 1);
    assert_eq!(ledger.import(None, SALT, vec![8, 8]), None, "nothing is evicted for it");
    assert_eq!(ledger.take(1), Some(vec![second]));
    assert!(!ledger.forget(&end), "it is gone");
    assert!(ledger.forget(&parent));
    assert_eq!(ledger.take(1), Some(vec![first]));
    assert!(finds(&ledger, &used[0]));
}

#[test]
fn what_is_listed_begins_with_parents_and_what_is_hot() {
    let mut ledger = Ledger::new(8, 2);
    let (cold, hot) = (chain(&mut ledger, 1, 2), chain(&mut ledger, 2, 2));
    let taken = ledger.take(1).unwrap()[0];
    let held = content(None, &[3, 3], taken);
    ledger.publish(held.clone());
    assert_eq!(ledger.export(), [&[held][..], &hot, &cold].concat());
}

proptest! {
    #[test]
    fn every_block_is_free_or_held_or_cached(actions in proptest::collection::vec((0u8..5, 0u32..6), 1..200)) {
        let mut ledger = Ledger::new(10, 2);
        let mut chains: Vec<Vec<PrefixBlock>> = Vec::new();
        for (action, n) in actions {
            match action {
                // A new chain, as far as its content is new.
                0 | 1 => if let Some(blocks) = ledger.take(n as usize % 4 + 1) {
                    let mut held: Vec<PrefixBlock> = Vec::new();
                    for (i, block) in (0..).zip(blocks) {
                        let next = content(held.last(), &[n, i], block);
                        if ledger.publish(next.clone()) == Publication::Published {
                            held.push(next);
                        } else {
                            ledger.release(block);
                            break;
                        }
                    }
                    // Blocks after a break were never pushed; give them back too.
                    let keep: Vec<BlockId> = held.iter().map(|known| known.block).collect();
                    for block in (0..10).map(BlockId) {
                        let elsewhere = chains.iter().flatten().any(|known| known.block == block);
                        if ledger.holders(block) > 0 && !keep.contains(&block) && !elsewhere {
                            ledger.release(block);
                        }
                    }
                    chains.push(held);
                },
                // A second holder of a chain.
                2 => if let Some(known) = chains.get(n as usize).cloned() {
                    known.iter().for_each(|known| ledger.share(known.block));
                    chains.push(known);
                },
                3 => if !chains.is_empty() {
                    let gone = chains.swap_remove(n as usize % chains.len());
                    gone.iter().rev().for_each(|known| ledger.release(known.block));
                },
                _ => drop(ledger.import(None, SALT, vec![100, n])),
            }
            ledger.audit();
            for known in chains.iter().flatten() {
                prop_assert!(finds(&ledger, known), "what is held is found");
            }
        }
    }
}
