//! The house rules, checked.

mod layers;
mod shared;
mod text;

use anyhow::{Result, bail};

/// Checks everything; all breaches are named at once.
#[allow(clippy::print_stdout)]
pub(crate) fn run() -> Result<()> {
    let mut breaches = layers::check(&layers::metadata()?);
    breaches.extend(shared::check()?);
    breaches.extend(text::check()?);
    if breaches.is_empty() {
        println!("tidy: no breach of the house rules");
        return Ok(());
    }
    breaches.iter().for_each(|breach| eprintln!("tidy: {breach}"));
    bail!("{} breaches of the house rules", breaches.len())
}
