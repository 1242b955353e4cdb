//! The real downloader against a real hub that misbehaves.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hub::{Hub, HubError, Limits, Pulled, Reference, Settings};
use sha2::{Digest, Sha256};
use support::{COMMIT, TestHub, Trick};

const SIZE: usize = 300_000;

fn content(seed: u8) -> Vec<u8> {
    (0..SIZE).map(|i| (i as u64).wrapping_mul(2_654_435_761).to_le_bytes()[2] ^ seed).collect()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn git(bytes: &[u8]) -> String {
    let mut hash = sha1::Sha1::new_with_prefix(format!("blob {}\0", bytes.len()));
    hash.update(bytes);
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn limits() -> Limits {
    let ms = Duration::from_millis;
    let (stall, pause, pause_max, lock) = (ms(400), ms(2), ms(10), ms(5_000));
    Limits { connect: ms(1_000), stall, tries: 4, pause, pause_max, lock, disk_reserve: 0 }
}

struct World {
    server: TestHub,
    folder: tempfile::TempDir,
}

impl World {
    /// A hub with one model of two quants.
    async fn new() -> Self {
        let server = TestHub::start().await;
        for (name, seed) in [("m-Q8_0.gguf", 1), ("m-Q4_K_M.gguf", 2)] {
            let bytes = content(seed);
            let etag = sha256(&bytes);
            server.add(name, bytes, &etag, true);
        }
        World { server, folder: tempfile::tempdir().unwrap() }
    }

    fn settings(&self) -> Settings {
        Settings {
            endpoint: Some(self.server.url.clone()),
            cache: Some(self.cache()),
            token: Some("hf_secret".into()),
            limits: limits(),
            ..Settings::default()
        }
    }

    fn hub(&self) -> Hub {
        Hub::new(self.settings())
    }

    fn cache(&self) -> PathBuf {
        self.folder.path().join("hub")
    }

    fn repo(&self) -> PathBuf {
        self.cache().join("models--org--repo")
    }

    fn blob(&self, seed: u8) -> PathBuf {
        self.repo().join("blobs").join(sha256(&content(seed)))
    }

    fn incomplete(&self, seed: u8) -> PathBuf {
        let blob = self.blob(seed);
        blob.with_file_name(format!("{}.incomplete", blob.file_name().unwrap().to_str().unwrap()))
    }

    async fn pull(&self, reference: &str) -> Result<PathBuf, HubError> {
        pull(&self.hub(), reference).await
    }

    /// Every file below the folder, but for locks.
    fn tree(&self) -> Vec<String> {
        fn walk(folder: &Path, root: &Path, found: &mut Vec<String>) {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                match entry.file_type().unwrap().is_dir() {
                    true => walk(&entry.path(), root, found),
                    false => found.push(entry.path().strip_prefix(root).unwrap().to_str().unwrap().into()),
                }
            }
        }
        let mut found = Vec::new();
        walk(self.folder.path(), self.folder.path(), &mut found);
        found.retain(|path| !path.contains(".locks/"));
        found.sort();
        found
    }
}

async fn pull(hub: &Hub, reference: &str) -> Result<PathBuf, HubError> {
    hub.pull(&Reference::parse(reference).unwrap(), &|_| {}).await
}

#[tokio::test]
async fn a_model_is_fetched_over_redirects_and_lies_where_every_hub_client_looks() {
    let world = World::new().await;
    let (done, fresh) = (AtomicU64::new(0), AtomicU64::new(0));
    let report = |pulled: Pulled| {
        assert!(pulled.done <= pulled.total);
        done.store(pulled.done, Ordering::Relaxed);
        fresh.fetch_add(pulled.fresh, Ordering::Relaxed);
    };
    let reference = Reference::parse("org/repo:q8_0").unwrap();
    let path = world.hub().pull(&reference, &report).await.unwrap();
    assert_eq!(path, world.repo().join("snapshots").join(COMMIT).join("m-Q8_0.gguf"));
    assert_eq!(std::fs::read(&path).unwrap(), content(1));
    assert_eq!(std::fs::read_link(&path).unwrap(), Path::new("../../blobs").join(sha256(&content(1))));
    assert_eq!(std::fs::read_to_string(world.repo().join("refs/main")).unwrap(), COMMIT);
    assert_eq!([done.into_inner(), fresh.into_inner()], [SIZE as u64; 2]);
    assert_eq!(hf_hub::Cache::new(world.cache()).model("org/repo".into()).get("m-Q8_0.gguf"), Some(path));
    // The token is for the hub, never for the host that it sends us to.
    let tokens: Vec<_> = world.server.asks().into_iter().map(|ask| (ask.elsewhere, ask.token.is_some())).collect();
    assert!(
        tokens.contains(&(true, false)) && tokens.iter().all(|(elsewhere, token)| elsewhere != token),
        "{tokens:?}"
    );
    // A second time only the list is asked for; the preferred quant is another file.
    let asked = world.server.asks().len();
    world.pull("org/repo:Q8_0").await.unwrap();
    assert_eq!(world.server.asks().len(), asked + 1);
    assert_eq!(std::fs::read(world.pull("org/repo").await.unwrap()).unwrap(), content(2));
}

#[tokio::test]
async fn a_cut_download_goes_on_where_it_was_cut() {
    let world = World::new().await;
    world.server.tricks([Trick::Cut(100_000), Trick::Cut(0), Trick::Cut(50_000)]);
    let path = world.pull("org/repo:Q8_0").await.unwrap();
    assert_eq!(std::fs::read(path).unwrap(), content(1));
    let from: Vec<_> = world.server.asks().iter().filter(|ask| ask.is_download()).map(|ask| ask.from).collect();
    assert_eq!(from, [0, 100_000, 100_000, 150_000]);
    assert_eq!(world.server.sent(), SIZE, "no byte came twice");
}

#[tokio::test]
async fn a_hub_that_always_cuts_is_given_up_and_nothing_has_the_final_name() {
    let world = World::new().await;
    world.server.plan(|ask| ask.is_download().then_some(Trick::Cut(10)));
    let error = world.pull("org/repo:Q8_0").await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    assert_eq!(world.server.count(support::Ask::is_download), limits().tries as usize);
    assert!(!world.blob(1).exists() && !world.repo().join("refs/main").exists());
    assert_eq!(std::fs::metadata(world.incomplete(1)).unwrap().len(), 40);
    assert_eq!(words::Error::from(error).code(), words::Code::UpstreamFailed);
}

#[tokio::test]
async fn a_download_that_nobody_waits_for_stops_and_is_gone_on_with() {
    let world = World::new().await;
    world.server.tricks([Trick::Stall(120_000)]);
    let came = Arc::new(tokio::sync::Notify::new());
    let (hub, notify) = (world.hub(), came.clone());
    let task = tokio::spawn(async move {
        let report = |pulled: Pulled| {
            if pulled.done >= 120_000 {
                notify.notify_one();
            }
        };
        hub.pull(&Reference::parse("org/repo:Q8_0").unwrap(), &report).await
    });
    came.notified().await;
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
    assert!(!world.blob(1).exists());
    world.pull("org/repo:Q8_0").await.unwrap();
    let last = world.server.asks().into_iter().rfind(|ask| ask.is_download()).unwrap();
    assert_eq!((last.from, world.server.sent()), (120_000, SIZE));
}

#[tokio::test]
async fn a_silent_hub_is_asked_again() {
    let world = World::new().await;
    world.server.tricks([Trick::Stall(1_000)]);
    world.pull("org/repo:Q8_0").await.unwrap();
    assert_eq!(world.server.sent(), SIZE);
}

#[tokio::test]
async fn a_hub_without_ranges_sends_it_all_again() {
    let world = World::new().await;
    world.server.tricks([Trick::Cut(100_000), Trick::NoRanges]);
    let path = world.pull("org/repo:Q8_0").await.unwrap();
    assert_eq!(std::fs::read(path).unwrap(), content(1));
    assert_eq!(world.server.sent(), SIZE + 100_000);
}

#[tokio::test]
async fn a_part_from_elsewhere_is_not_taken() {
    let world = World::new().await;
    world.server.tricks([Trick::Cut(100_000), Trick::OtherPart]);
    let error = world.pull("org/repo:Q8_0").await.unwrap_err();
    assert!(matches!(&error, HubError::Strange { .. }) && !error.is_transient(), "{error}");
    assert!(!world.blob(1).exists());
}

#[tokio::test]
async fn a_wrong_checksum_leaves_nothing_and_is_tried_once_more() {
    let world = World::new().await;
    world.server.plan(|ask| ask.is_download().then_some(Trick::Damage));
    let error = world.pull("org/repo:Q8_0").await.unwrap_err();
    assert!(matches!(&error, HubError::Checksum { .. }) && !error.is_transient(), "{error}");
    assert_eq!(words::Error::from(error).code(), words::Code::InvalidModelFile);
    assert_eq!(world.server.count(support::Ask::is_download), 2);
    assert_eq!(world.tree(), Vec::<String>::new());
    // Once damaged, once whole.
    world.server.tricks([Trick::Damage]);
    assert_eq!(std::fs::read(world.pull("org/repo:Q8_0").await.unwrap()).unwrap(), content(1));
}

#[tokio::test]
async fn a_damaged_part_of_an_earlier_download_is_healed() {
    let world = World::new().await;
    std::fs::create_dir_all(world.repo().join("blobs")).unwrap();
    std::fs::write(world.incomplete(1), vec![7; 1_000]).unwrap();
    assert_eq!(std::fs::read(world.pull("org/repo:Q8_0").await.unwrap()).unwrap(), content(1));
    let from: Vec<_> = world.server.asks().iter().filter(|ask| ask.is_download()).map(|ask| ask.from).collect();
    assert_eq!(from, [1_000, 0]);
}

#[tokio::test]
async fn a_file_that_grows_is_refused_before_it_fills_the_disk() {
    for with_length in [true, false] {
        let world = World::new().await;
        world.server.plan(move |ask| ask.is_download().then_some(Trick::Grow { with_length }));
        let error = world.pull("org/repo:Q8_0").await.unwrap_err();
        assert!(matches!(error, HubError::Size { announced: 300_000, sent: 300_004, .. }), "{error}");
        assert!(!world.blob(1).exists());
        assert_eq!(world.server.count(support::Ask::is_download), 1);
    }
}

#[tokio::test]
async fn faults_of_the_server_are_tried_again_and_those_of_the_asker_are_not() {
    let world = World::new().await;
    // Each kind of request fails once: list, head, and the bytes themselves.
    let mut failed = std::collections::BTreeSet::new();
    world.server.plan(move |ask| {
        let first = failed.insert((ask.method.clone(), ask.path.clone(), ask.elsewhere));
        first.then_some(Trick::Status([500, 503, 429][failed.len() % 3], "retry-after: 1\r\n"))
    });
    world.pull("org/repo:Q8_0").await.unwrap();
    world.server.plan(|_| Some(Trick::Status(500, "")));
    let asked = world.server.asks().len();
    let fresh = Hub::new(Settings { cache: Some(world.folder.path().join("other")), ..world.settings() });
    let error = pull(&fresh, "org/repo:Q8_0").await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    assert_eq!(world.server.asks().len() - asked, limits().tries as usize);
    for (status, words) in [(401, "HF_TOKEN"), (403, "licence is accepted at http"), (404, "org/repo at main")] {
        world.server.plan(move |_| Some(Trick::Status(status, "")));
        let asked = world.server.asks().len();
        let error = pull(&fresh, "org/repo:Q8_0").await.unwrap_err();
        assert!(error.to_string().contains(words) && !error.is_transient(), "{error}");
        assert_eq!(world.server.asks().len(), asked + 1);
    }
    world.server.plan(|ask| ask.is_download().then_some(Trick::Status(404, "")));
    let error = pull(&fresh, "org/repo:Q8_0").await.unwrap_err().to_string();
    assert!(error.contains("org/repo/m-Q8_0.gguf"), "{error}");
    assert!(!world.folder.path().join("other/models--org--repo/refs").exists());
}

#[tokio::test]
async fn no_name_of_the_network_leads_out_of_the_cache() {
    let world = World::new().await;
    let before = world.tree();
    for name in ["../../../evil-F16.gguf", "/tmp/evil-F16.gguf", "a/../../../evil-F16.gguf", "..\\evil-F16.gguf"] {
        world.server.list(name);
    }
    let error = world.pull("org/repo:F16").await.unwrap_err();
    assert!(matches!(&error, HubError::Choice { choices, .. } if choices.len() == 2), "{error}");
    let list = |sha: &str| format!("{{\"sha\":{sha:?},\"siblings\":[{{\"rfilename\":\"m-Q8_0.gguf\"}}]}}");
    for sha in ["../../../../evil", "", "main", "0123"] {
        let body = list(sha);
        world.server.plan(move |ask| ask.path.starts_with("/api").then(|| Trick::Body(body.clone())));
        assert!(matches!(world.pull("org/repo:Q8_0").await, Err(HubError::Strange { .. })), "{sha}");
    }
    world.server.plan(|_| None);
    for etag in ["../../../../evil", "", "x", &"../".repeat(21), &"z".repeat(64)] {
        world.server.edit("m-Q8_0.gguf", |file| file.etag = etag.into());
        assert!(matches!(world.pull("org/repo:Q8_0").await, Err(HubError::Strange { .. })), "{etag}");
    }
    assert_eq!(world.tree(), before);
    // Beside such names the honest ones still serve.
    assert!(world.pull("org/repo:Q4_K_M").await.is_ok());
}

#[tokio::test]
async fn two_who_want_the_same_cost_the_hub_one_download() {
    let world = World::new().await;
    world.server.tricks([Trick::Cut(200_000)]);
    let hubs: Vec<Hub> = (0..4).map(|_| world.hub()).collect();
    let pulls = hubs.iter().map(|hub| pull(hub, "org/repo:Q8_0"));
    for path in futures_util::future::join_all(pulls).await {
        assert_eq!(std::fs::read(path.unwrap()).unwrap(), content(1));
    }
    assert_eq!(world.server.sent(), SIZE);
}

#[tokio::test]
async fn what_is_cached_needs_no_hub() {
    let world = World::new().await;
    let offline = Hub::new(Settings { offline: true, ..world.settings() });
    let error = pull(&offline, "org/repo:Q8_0").await.unwrap_err();
    assert!(error.to_string().contains("offline") && error.to_string().contains("org/repo:Q8_0"), "{error}");
    assert_eq!(world.server.asks().len(), 0);
    let online = world.pull("org/repo:Q8_0").await.unwrap();
    let asked = world.server.asks().len();
    for reference in ["org/repo:Q8_0".to_string(), "org/repo".into(), format!("org/repo:Q8_0@{COMMIT}")] {
        assert_eq!(pull(&offline, &reference).await.unwrap(), online);
    }
    assert!(matches!(pull(&offline, "org/repo:Q4_K_M").await, Err(HubError::Offline { .. })));
    // A commit's very file is not asked for, even where one could.
    assert_eq!(world.pull(&format!("org/repo:Q8_0@{COMMIT}")).await.unwrap(), online);
    assert_eq!(world.server.asks().len(), asked);
    // A hub that is down, or gone altogether, is no hindrance either.
    world.server.plan(|_| Some(Trick::Status(503, "")));
    assert_eq!(world.pull("org/repo:Q8_0").await.unwrap(), online);
    let nowhere = Settings { endpoint: Some("http://127.0.0.1:1".into()), ..world.settings() };
    let nowhere = Hub::new(nowhere);
    assert_eq!(pull(&nowhere, "org/repo:Q8_0").await.unwrap(), online);
    let error = pull(&nowhere, "org/repo:Q4_K_M").await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    // A hub that refuses is believed: the licence may have been withdrawn.
    world.server.plan(|_| Some(Trick::Status(401, "")));
    assert!(matches!(world.pull("org/repo:Q8_0").await, Err(HubError::Refused { .. })));
}

#[tokio::test]
async fn a_disk_that_is_too_small_is_not_filled() {
    let world = World::new().await;
    world.server.edit("m-Q8_0.gguf", |file| file.size = 1 << 60);
    let error = world.pull("org/repo:Q8_0").await.unwrap_err();
    assert!(matches!(&error, HubError::Room { needed, .. } if *needed == 1 << 60), "{error}");
    assert!(error.to_string().contains("1152921504606846976"), "{error}");
    assert_eq!(world.server.count(support::Ask::is_download), 0);
    let reserve = Limits { disk_reserve: u64::MAX, ..limits() };
    let hub = Hub::new(Settings { limits: reserve, ..world.settings() });
    assert!(matches!(pull(&hub, "org/repo:Q4_K_M").await, Err(HubError::Room { .. })));
}

#[tokio::test]
async fn small_files_beside_the_model_come_with_it_and_split_models_whole() {
    let world = World::new().await;
    let small = br#"{"temperature": 0.6}"#.to_vec();
    for name in ["s/generation_config.json", "generation_config.json"] {
        world.server.add(name, small.clone(), &git(&small), false);
    }
    for (part, seed) in [(1, 5), (2, 6)] {
        let bytes = content(seed);
        world.server.add(&format!("s/big model-F32-0000{part}-of-00002.gguf"), bytes.clone(), &sha256(&bytes), true);
    }
    let reference = Reference::parse("org/repo:F32").unwrap();
    let found = world.hub().find(&reference).await.unwrap();
    assert_eq!((found.model().len(), found.commit()), (2, COMMIT));
    let path = world.hub().fetch(&found, &|_| {}).await.unwrap();
    let folder = path.parent().unwrap();
    assert_eq!(path, folder.join("big model-F32-00001-of-00002.gguf"));
    assert_eq!(std::fs::read(folder.join("big model-F32-00002-of-00002.gguf")).unwrap(), content(6));
    assert_eq!(std::fs::read(folder.join("generation_config.json")).unwrap(), small);
    assert!(!folder.parent().unwrap().join("generation_config.json").exists());
}

#[tokio::test]
async fn redirects_end() {
    let world = World::new().await;
    world.server.plan(|_| Some(Trick::Status(302, "location: /again\r\n")));
    assert!(matches!(world.pull("org/repo").await, Err(HubError::Strange { .. })));
    assert!(world.server.asks().len() < 20);
    world.server.plan(|_| Some(Trick::Status(302, "location: file:///etc/passwd\r\n")));
    assert!(matches!(world.pull("org/repo").await, Err(HubError::Strange { .. })));
}
