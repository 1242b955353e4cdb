//! Manual pages and shell completions, from a program's own command line.

use std::io::Result;
use std::path::PathBuf;

use clap::{Args, Command};
use clap_complete::Shell;

/// Where the pages go.
#[derive(Clone, Debug, Args)]
pub struct PagesArgs {
    /// The folder to write 'man1', 'bash', 'zsh' and 'fish' into.
    folder: PathBuf,
}

/// The shells whose completions are written, and their folders.
const SHELLS: [(Shell, &str); 3] = [(Shell::Bash, "bash"), (Shell::Zsh, "zsh"), (Shell::Fish, "fish")];

/// Writes a manual page for the program and each of its commands, and completions for each shell.
///
/// # Errors
/// When the folder can't be written to.
pub fn write(command: Command, args: &PagesArgs) -> Result<()> {
    let made = |name: &str| -> Result<PathBuf> {
        let folder = args.folder.join(name);
        std::fs::create_dir_all(&folder)?;
        Ok(folder)
    };
    let name = command.get_name().to_string();
    clap_mangen::generate_to(command.clone().disable_help_subcommand(true), made("man1")?)?;
    for (shell, folder) in SHELLS {
        clap_complete::generate_to(shell, &mut command.clone(), &name, made(folder)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn there_is_a_page_for_each_command_that_is_not_hidden_and_a_file_for_each_shell() {
        let folder = tempfile::tempdir().unwrap();
        let command = Command::new("tool")
            .version("1")
            .subcommand(Command::new("serve").about("Serve"))
            .subcommand(Command::new("secret").hide(true));
        write(command, &PagesArgs { folder: folder.path().into() }).unwrap();
        let names = |name: &str| {
            let entries = std::fs::read_dir(folder.path().join(name)).unwrap();
            let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        assert_eq!(names("man1"), ["tool-serve.1", "tool.1"]);
        assert_eq!(
            (names("bash").len(), names("zsh"), names("fish")),
            (1, vec!["_tool".into()], vec!["tool.fish".into()])
        );
    }
}
