//! The units, folders, users and firewall services that are shipped, against the programs' own defaults.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use service::config::{Sources, load};
use service::exit;

/// What a stop may take beyond the exit's budget: two more of its shutdowns before the deadman ends it, and air.
const AIR: Duration = Duration::from_secs(20);

fn deploy(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy")).join(name)
}

fn read(name: &str) -> String {
    std::fs::read_to_string(deploy(name)).unwrap()
}

/// Reads the last value of each key, and all of those that may be there again and again.
fn unit(name: &str) -> BTreeMap<String, Vec<String>> {
    let mut keys: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in read(name).lines().filter(|line| !line.starts_with('#')) {
        if let Some((key, value)) = line.split_once('=') {
            keys.entry(key.into()).or_default().push(value.into());
        }
    }
    keys
}

fn seconds(unit: &BTreeMap<String, Vec<String>>, key: &str) -> u64 {
    unit[key][0].trim_end_matches('s').parse().unwrap()
}

fn whole_minutes(span: Duration) -> u64 {
    span.as_secs_f64().max(1.0).div_euclid(60.0) as u64 * 60 + 60
}

/// The budget of the exit, and of its last step.
fn budgets() -> [(&'static str, Duration, Duration); 2] {
    let (cortex, neuron) = (cortex::options::Options::default(), neuron::options::Options::default());
    [
        ("cortex", cortex.drain.exit_budget(), cortex::options::SHUTDOWN_MAX),
        ("neuron", neuron.drain.exit_budget(), neuron::options::SHUTDOWN_MAX),
    ]
}

#[test]
fn a_unit_waits_for_the_exits_whole_budget_and_not_much_longer() {
    for (program, budget, shutdown) in budgets() {
        let unit = unit(&format!("systemd/{program}.service"));
        assert_eq!(seconds(&unit, "TimeoutStopSec"), whole_minutes(budget + shutdown * 2 + AIR), "{program}");
        assert_eq!(unit["TimeoutStartSec"], ["1800s"]);
    }
}

#[test]
fn a_unit_knows_the_exit_codes_and_starts_again_whatever_else_happens() {
    for (program, ..) in budgets() {
        let unit = unit(&format!("systemd/{program}.service"));
        assert_eq!(unit["RestartPreventExitStatus"], [exit::CONFIG.to_string()]);
        assert_eq!(unit["SuccessExitStatus"], [exit::CUT.to_string()]);
        assert_eq!((&unit["Type"][0], &unit["Restart"][0]), (&"notify".to_string(), &"always".to_string()));
        assert_eq!((&unit["KillSignal"][0], &unit["KillMode"][0]), (&"SIGTERM".to_string(), &"mixed".to_string()));
        assert!(seconds(&unit, "WatchdogSec") >= 10);
        // Within the limit's interval a program that fails at once must be able to reach the limit.
        let (pause, burst) = (seconds(&unit, "RestartSec"), seconds(&unit, "StartLimitBurst"));
        assert!(pause * burst < seconds(&unit, "StartLimitIntervalSec"), "{program} would be restarted for ever");
    }
}

#[test]
fn the_folders_of_the_units_are_those_that_the_programs_are_told_and_the_packages_make() {
    let neuron = unit("systemd/neuron.service");
    let state = format!("/var/lib/{}", neuron["StateDirectory"][0]);
    let cache = format!("/var/cache/{}", neuron["CacheDirectory"][0]);
    let told = |name: &str| {
        let mut pairs = neuron["Environment"].iter().filter_map(|pair| pair.split_once('='));
        pairs.find_map(|(key, value)| (key == name).then(|| value.to_string())).unwrap()
    };
    assert_eq!(told("NEURON__NODE__STATE_DIR"), state);
    assert!(told("HF_HUB_CACHE").starts_with(&cache));
    let cortex = unit("systemd/cortex.service");
    let store = cortex["Environment"][0].strip_prefix("CORTEX__ROLLOUT__STORE=").unwrap();
    assert!(store.starts_with(&format!("/var/lib/{}/", cortex["StateDirectory"][0])));
    for (program, unit) in [("cortex", cortex), ("neuron", neuron)] {
        let made = read(&format!("tmpfiles/{program}.conf"));
        let user = &unit["User"][0];
        assert!(made.contains(&format!("d /var/lib/{} 0700 {user} {user}", unit["StateDirectory"][0])), "{made}");
        assert!(read(&format!("sysusers/{program}.conf")).contains(&format!("u {user} - ")));
        assert_eq!(unit["ExecStart"], [format!("/usr/bin/{program} serve --config /etc/cortex/{program}.toml")]);
    }
    assert!(read("tmpfiles/neuron.conf").contains(&format!("d {cache} 0755")));
}

fn loads<T: serde::de::DeserializeOwned + serde::Serialize + Default>(program: &str) -> T {
    let environment = &unit(&format!("systemd/{program}.service"))["Environment"];
    let environment = environment.iter().filter_map(|pair| pair.split_once('='));
    load(&Sources {
        program: program.into(),
        file: Some(deploy(&format!("{program}.example.toml"))),
        environment: environment.map(|(key, value)| (key.into(), value.into())).collect(),
        overrides: Vec::new(),
    })
    .unwrap()
}

#[test]
fn the_shipped_example_under_the_units_variables_is_a_configuration_that_works() {
    let cortex: cortex::options::Options = loads("cortex");
    cortex.check().unwrap();
    assert!(cortex.rollout.store.is_some_and(|store| store.starts_with("/var/lib/cortex")));
    let neuron: neuron::options::Options = loads("neuron");
    neuron.check().unwrap();
    assert!(neuron.node.state_dir.is_some_and(|dir| dir.starts_with("/var/lib/neuron")));
}

#[test]
fn the_catalogue_that_operators_read_of_is_a_configuration_that_works() {
    let text = read("README.md");
    let block = text.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next());
    let block = block.into_iter().find(|block| block.contains("[[models]]")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("neuron.toml");
    std::fs::write(&file, block).unwrap();
    let sources = Sources { program: "neuron".into(), file: Some(file), ..Sources::default() };
    let options: neuron::options::Options = load(&sources).unwrap();
    options.check().unwrap();
    assert_eq!((options.models.len(), options.default_models.len()), (2, 1));
}

#[test]
fn the_firewall_services_open_the_default_ports() {
    let (cortex, neuron) = (cortex::options::Options::default(), neuron::options::Options::default());
    let ports = |name: &str| -> Vec<u16> {
        let text = read(name);
        let parts = text.split("port=\"").skip(1).filter_map(|part| part.split('"').next()?.parse().ok());
        parts.collect()
    };
    assert_eq!(ports("firewalld/cortex.xml"), [cortex.api.bind.port()]);
    assert!(read("firewalld/cortex.xml").contains(&cortex.admin.bind.port().to_string()));
    assert_eq!(ports("firewalld/cortex-neuron.xml"), [neuron.data.bind.port(), neuron.control.bind.port()]);
}

#[test]
fn an_upgrade_that_was_given_up_on_is_ended_with_it() {
    let unit = unit("systemd/neuron-upgrade@.service");
    let patience = neuron::options::UpgradeOptions::default().timeout().as_secs();
    assert_eq!(seconds(&unit, "TimeoutStartSec"), patience);
    assert_eq!(unit["KillMode"], ["control-group"]);
}

/// Runs systemd's own check; `None` where it is not installed.
fn analyze(arguments: &[&str]) -> Option<(bool, String)> {
    let output = match Command::new("systemd-analyze").args(arguments).output() {
        Ok(output) => output,
        Err(error) => {
            eprintln!("SKIPPED: systemd-analyze is not here ({error}); install systemd");
            return None;
        }
    };
    let text = [output.stdout, output.stderr].concat();
    Some((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
}

#[test]
fn what_a_breach_of_a_program_could_reach_is_little() {
    // 10 is all, 0 nothing; the last line says it.
    for (program, ..) in budgets() {
        let file = deploy(&format!("systemd/{program}.service"));
        let Some((_, text)) = analyze(&["security", "--offline=true", file.to_str().unwrap()]) else { return };
        let overall = text.lines().find(|line| line.contains("Overall exposure level")).unwrap();
        let level: f64 = overall.split(": ").nth(1).unwrap().split_whitespace().next().unwrap().parse().unwrap();
        eprintln!("{program}: {level}");
        assert!(level <= 2.5, "{text}");
    }
}
