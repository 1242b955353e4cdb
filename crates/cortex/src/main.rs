//! The gateway's program.

fn main() -> std::process::ExitCode {
    cortex::main()
}
