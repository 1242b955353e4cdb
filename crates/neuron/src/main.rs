//! The worker's program.

fn main() -> std::process::ExitCode {
    neuron::main()
}
