//! What command lines say on standard output.

use std::fmt;
use std::io::{ErrorKind, Write};

use crate::exit;

/// Says a line on standard output, as `println!` does, but for its end: see [`terminal::write`](crate::terminal::write).
#[macro_export]
macro_rules! say {
    () => { $crate::terminal::write(format_args!("\n")) };
    ($($words:tt)*) => { $crate::terminal::write(format_args!("{}\n", format_args!($($words)*))) };
}

/// Writes to standard output, at once. A reader that has left (`cortex status | head -1`) ends the program without a
/// word, and so does whatever else stands in the way, with one: there is nobody left to do the rest for.
pub fn write(words: fmt::Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    if let Err(error) = out.write_fmt(words).and_then(|()| out.flush()) {
        if error.kind() != ErrorKind::BrokenPipe {
            warn(format_args!("standard output can't be written to: {error}"));
        }
        std::process::exit(i32::from(exit::FAILURE));
    }
}

/// Writes a line to standard error, where anybody reads it.
pub fn warn(words: fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "{words}");
}
