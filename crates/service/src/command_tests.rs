//! Real processes: how each kind of end is told, and that nothing is left of any.
#![allow(clippy::unwrap_used)]
use super::*;

fn shell(script: &str) -> Order {
    Order { argv: ["sh", "-c", script].map(String::from).to_vec(), ..Order::default() }
}

const MINUTE: Duration = Duration::from_secs(60);

async fn lines_of(order: &Order, timeout: Duration) -> (Result<(), CommandFailure>, Vec<String>) {
    let mut lines = Vec::new();
    let ended = run(order, timeout, |line| lines.push(line.to_string())).await;
    (ended, lines)
}

#[tokio::test]
async fn a_command_says_how_it_ended() {
    let end = async |script: &str| lines_of(&shell(script), MINUTE).await.0;
    assert_eq!(end("exit 0").await, Ok(()));
    assert_eq!(end("exit 3").await, Err(CommandFailure::Exited("sh".into(), 3)));
    assert_eq!(end("kill -9 $$").await, Err(CommandFailure::Signalled("sh".into(), 9)));
    let missing = Order { argv: vec!["/nonexistent/program".into()], ..Order::default() };
    assert!(matches!(lines_of(&missing, MINUTE).await.0, Err(CommandFailure::Missing(_))));
    assert!(matches!(lines_of(&Order::default(), MINUTE).await.0, Err(CommandFailure::Missing(_))));
    let folder = tempfile::tempdir().unwrap();
    let plain = folder.path().join("plain");
    std::fs::write(&plain, "#!/bin/sh\n").unwrap();
    let plain = Order { argv: vec![plain.display().to_string()], ..Order::default() };
    assert!(matches!(lines_of(&plain, MINUTE).await.0, Err(CommandFailure::NotExecutable(_))));
}

#[tokio::test]
async fn a_command_gets_its_input_and_environment_and_its_lines_come_back() {
    let order = Order {
        environment: vec![("WHO".into(), "me".into())],
        directory: Some("/".into()),
        input: b"hello".to_vec(),
        ..shell("cat; echo; echo \"$WHO $PWD\" >&2; printf last")
    };
    let (ended, mut lines) = lines_of(&order, MINUTE).await;
    lines.sort();
    assert_eq!((ended, lines), (Ok(()), ["hello", "last", "me /"].map(String::from).to_vec()));
}

#[tokio::test]
async fn a_command_that_reads_nothing_is_not_waited_for() {
    let order = Order { input: vec![b'x'; 1 << 20], ..shell("exit 0") };
    assert_eq!(lines_of(&order, MINUTE).await.0, Ok(()));
}

#[tokio::test]
async fn what_a_command_leaves_running_ends_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let alive = folder.path().join("alive");
    let begun = std::time::Instant::now();
    let (ended, _) = lines_of(&shell(&format!("(sleep 1; touch {alive:?}) & exit 0")), MINUTE).await;
    assert_eq!(ended, Ok(()));
    assert!(begun.elapsed() < Duration::from_millis(900), "it waited for the child's pipe");
    tokio::time::sleep(Duration::from_millis(1300)).await;
    assert!(!alive.exists(), "a child outlived its command");
}

#[tokio::test]
async fn a_command_past_its_time_is_killed_with_its_children() {
    let folder = tempfile::tempdir().unwrap();
    let alive = folder.path().join("alive");
    let script = format!("trap '' TERM; echo here; (trap '' TERM; sleep 1; touch {alive:?}) & wait");
    let (ended, lines) = lines_of(&shell(&script), Duration::from_millis(300)).await;
    let after = Duration::from_millis(300);
    assert_eq!((ended, lines), (Err(CommandFailure::TimedOut("sh".into(), after)), vec!["here".into()]));
    tokio::time::sleep(Duration::from_millis(1300)).await;
    assert!(!alive.exists(), "a grandchild outlived the kill");
}

#[tokio::test]
async fn a_hundred_megabytes_of_output_take_no_memory_and_one_endless_line_is_cut() {
    let (mut count, mut longest) = (0usize, 0);
    let script = "yes 0123456789abcdef | head -c 104857600; head -c 1000000 /dev/zero | tr '\\0' x";
    let order = shell(script);
    let ended = run(&order, MINUTE, |line| {
        count += 1;
        longest = longest.max(line.len());
    });
    assert_eq!(ended.await, Ok(()));
    assert_eq!((count, longest), (104_857_600 / 17 + 1, LINE_BYTES_MAX));
}

#[tokio::test]
async fn a_guarded_command_and_its_children_end_with_whoever_started_it() {
    let order = Order { guarded: true, ..shell("sleep 1000 & echo begun; wait") };
    let mut running = Running::start(&order).unwrap();
    let (out, _err) = running.outputs();
    let mut out = Lines::new(out);
    assert!(out.fill().await > 0);
    // The guard sees no more of a death than the end of its input.
    running.guard.as_mut().unwrap().stdin = None;
    let ended = tokio::time::timeout(MINUTE, running.ended()).await.unwrap();
    assert_eq!(running.judge(ended), Err(CommandFailure::Signalled("sh".into(), 9)));
    assert_eq!(out.fill().await, 0, "its child holds the pipe no more");
}

#[test]
fn programs_are_found_as_commands_find_them() {
    assert!(find_program("sh").is_some_and(|path| path.is_absolute()));
    assert_eq!(find_program("/bin/sh"), Some("/bin/sh".into()));
    assert_eq!(find_program("/etc/passwd"), None);
    assert_eq!(find_program("no-such-program-anywhere"), None);
}
