//! The program under test, built with the tests so that they never run a stale one.

fn main() -> std::process::ExitCode {
    cortex::main()
}
