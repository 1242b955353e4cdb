//! `cargo xtask sim`: runs seeds, says what happened, and writes the log of what went wrong.
#![allow(clippy::print_stdout)]

use std::process::ExitCode;

use fleet_sim::{Count, Counters, RunOptions, run};

struct Arguments {
    seeds: u64,
    from: u64,
    replay: Option<u64>,
    json: bool,
}

fn arguments() -> Result<Arguments, String> {
    let mut parsed = Arguments { seeds: 200, from: 0, replay: None, json: false };
    let mut given = std::env::args().skip(1);
    while let Some(flag) = given.next() {
        let mut number = || {
            let value = given.next().ok_or(format!("{flag} needs a number"))?;
            value.parse::<u64>().map_err(|error| format!("{flag} {value}: {error}"))
        };
        match flag.as_str() {
            "--seeds" => parsed.seeds = number()?,
            "--from" => parsed.from = number()?,
            "--replay" => parsed.replay = Some(number()?),
            "--json" => parsed.json = true,
            _ => return Err(format!("unknown argument '{flag}': --seeds N, --from S, --replay SEED, --json")),
        }
    }
    Ok(parsed)
}

fn main() -> ExitCode {
    match arguments() {
        Ok(Arguments { replay: Some(seed), .. }) => replay(seed),
        Ok(arguments) => sweep(&arguments),
        Err(error) => {
            eprintln!("fleet-sim: {error}");
            ExitCode::FAILURE
        }
    }
}

fn replay(seed: u64) -> ExitCode {
    let report = run(seed, RunOptions { whole_log: true, ..RunOptions::default() });
    print!("{}", report.log);
    match report.violation {
        Some(violation) => {
            println!("seed {seed}: {violation}");
            ExitCode::FAILURE
        }
        None => ExitCode::SUCCESS,
    }
}

fn sweep(arguments: &Arguments) -> ExitCode {
    // What panics is caught and told with its seed; the hook's own words would only repeat it.
    std::panic::set_hook(Box::new(|_| {}));
    let (mut counters, mut events, mut found) = (Counters::default(), 0, Vec::new());
    for seed in arguments.from..arguments.from.saturating_add(arguments.seeds) {
        let report = run(seed, RunOptions::default());
        counters.merge(&report.counters);
        events += report.events;
        if let Some(violation) = report.violation {
            eprintln!("seed {seed}: {violation}; `cargo xtask sim --replay {seed}` shows how it came to that");
            found.push(seed);
        }
    }
    if arguments.json {
        print_json(arguments, &counters, events, &found);
    } else {
        for count in Count::ALL {
            println!("{:>12}  {}", counters.of(*count), count.name());
        }
        println!("{:>12}  events", events);
        println!("{} seeds from {}, {} violations", arguments.seeds, arguments.from, found.len());
    }
    if found.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn print_json(arguments: &Arguments, counters: &Counters, events: u64, found: &[u64]) {
    let counts: Vec<String> =
        Count::ALL.iter().map(|count| format!("\"{}\":{}", count.name(), counters.of(*count))).collect();
    let found: Vec<String> = found.iter().map(u64::to_string).collect();
    println!(
        "{{\"from\":{},\"seeds\":{},\"events\":{events},\"violations\":[{}],\"counters\":{{{}}}}}",
        arguments.from,
        arguments.seeds,
        found.join(","),
        counts.join(",")
    );
}
