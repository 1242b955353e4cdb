//! How much memory a process group takes.

/// Reads the group and the resident pages of one process; `None` when it ended meanwhile.
fn facts(stat: &str) -> Option<(i32, u64)> {
    // The name in parentheses may hold anything; numbers follow its last one.
    let rest = &stat[stat.rfind(')')? + 1..];
    let mut fields = rest.split_ascii_whitespace();
    // After the name come state, parent and group; the resident set is the 24th field of all.
    let group = fields.nth(2)?.parse().ok()?;
    let pages = fields.nth(18)?.parse().ok()?;
    Some((group, pages))
}

/// Returns the resident bytes of all processes of a group, pages that they share counted in each; 0 when there is none.
/// Reads /proc, so it may block.
pub(super) fn resident_bytes(group: u32) -> u64 {
    let Ok(entries) = std::fs::read_dir("/proc") else { return 0 };
    let mut pages = 0;
    for entry in entries.flatten() {
        let name = entry.file_name();
        if !name.to_str().is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit())) {
            continue;
        }
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        pages += facts(&stat).filter(|(of, _)| *of as u32 == group).map_or(0, |(_, pages)| pages);
    }
    pages * rustix::param::page_size() as u64
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_group_takes_what_its_processes_take_whatever_they_are_called() {
        let line = "7 (a) b (c) S 1 42 42 0 -1 0 1 2 3 4 5 6 7 8 20 0 1 0 99 1000000 250 18446744073709551615 1";
        assert_eq!(facts(line), Some((42, 250)));
        assert_eq!(facts(""), None);
        let own = rustix::process::getpgrp().as_raw_nonzero().get() as u32;
        assert!(resident_bytes(own) > 1 << 20, "at least this test");
        assert_eq!(resident_bytes(u32::MAX), 0);
    }
}
