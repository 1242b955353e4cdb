//! The gateway's program.

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    // mimalloc asks for huge pages, and a connection touches little of each: they made a thousand slow bodies cost 131 MB
    // instead of 41, and gave no speed. A kernel that refuses costs memory and nothing else.
    let _ = rustix::thread::disable_transparent_huge_pages(true);
    cortex::main()
}
