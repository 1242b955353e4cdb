//! Exit codes, as systemd units know them.

/// Everything ended properly.
pub const CLEAN: u8 = 0;
/// Something failed that a restart may mend.
pub const FAILURE: u8 = 1;
/// The exit was wedged and the deadman ended it (EX_SOFTWARE).
pub const WEDGED: u8 = 70;
/// Streams were cut at the end of the drain's budget (EX_TEMPFAIL).
pub const CUT: u8 = 75;
/// The configuration is unusable; a restart can't mend it (EX_CONFIG).
pub const CONFIG: u8 = 78;
