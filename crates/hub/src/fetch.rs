//! From a reference to a path.

use std::path::PathBuf;
use std::sync::Arc;

use ::http::Method;
use serde::Deserialize;
use tokio::sync::OnceCell;

use crate::blob::Blob;
use crate::cache::{RepoCache, free_bytes, length};
use crate::choose::choose;
use crate::digest::Etag;
use crate::http::{Asked, Follow, Http};
use crate::names::{Commit, FileName};
use crate::transfer::{Order, transfer};
use crate::{HubError, Reference, Settings};

/// Most bytes of a list of a repo's files.
const LIST_BYTES_MAX: usize = 32 << 20;

/// A hub, and the folder where its files are kept; cheap to clone.
#[derive(Clone)]
pub struct Hub {
    inner: Arc<Inner>,
}

struct Inner {
    settings: Settings,
    /// Made when something is first asked: a worker whose models are all here needs no certificates.
    http: OnceCell<Http>,
}

/// How far a download is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pulled {
    /// Bytes that are here, of all files that were missing.
    pub done: u64,
    /// Bytes of all files that were missing.
    pub total: u64,
    /// Bytes that came over the network since the last report.
    pub fresh: u64,
}

/// Hears how far a download is: often, and on the caller's own task.
pub type Report<'a> = &'a (dyn Fn(Pulled) + Send + Sync);

/// The files that a reference means.
#[derive(Clone, Debug)]
pub struct Found {
    reference: Reference,
    commit: Commit,
    model: Vec<FileName>,
    side: Vec<FileName>,
}

impl Found {
    /// Returns the model's files: one, or the parts of a split one in their order.
    pub fn model(&self) -> &[FileName] {
        &self.model
    }

    /// Returns the commit they are of.
    pub fn commit(&self) -> &str {
        self.commit.as_str()
    }

    fn files(&self) -> impl Iterator<Item = &FileName> {
        self.model.iter().chain(&self.side)
    }
}

/// What the hub says of a repo at a revision.
#[derive(Deserialize)]
struct RepoInfo {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

impl Hub {
    /// Makes a hub; asks nothing yet.
    pub fn new(settings: Settings) -> Self {
        Hub { inner: Arc::new(Inner { settings, http: OnceCell::new() }) }
    }

    async fn http(&self) -> Result<&Http, HubError> {
        self.inner.http.get_or_try_init(|| async { Http::new(&self.inner.settings) }).await
    }

    fn cache(&self, reference: &Reference) -> Result<RepoCache, HubError> {
        let folder = self.inner.settings.cache.as_deref().ok_or(HubError::NoCache)?;
        Ok(RepoCache::new(folder, reference))
    }

    /// Finds what is here of a reference.
    fn local(cache: &RepoCache, reference: &Reference) -> Option<Result<Found, HubError>> {
        let commit = cache.commit(reference.revision())?;
        let names = cache.files(&commit);
        if names.is_empty() {
            return None;
        }
        Some(choose(reference, &names).map(|choice| {
            let (model, side) = (choice.model, choice.side);
            Found { reference: reference.clone(), commit, model, side }
        }))
    }

    /// Finds the files that a reference means. Asks the hub, unless a commit's very file is here; what is here is taken as
    /// well when the hub can't be asked.
    ///
    /// # Errors
    /// [`HubError`].
    pub async fn find(&self, reference: &Reference) -> Result<Found, HubError> {
        let cache = self.cache(reference)?;
        let settings = &self.inner.settings;
        let local = Self::local(&cache, reference);
        if settings.offline {
            return match local {
                Some(Ok(found)) => Ok(found),
                Some(Err(error)) if reference.quant().is_none() => Err(error),
                _ => {
                    let folder = settings.cache.clone().unwrap_or_default();
                    Err(HubError::Offline { what: reference.to_string(), folder })
                }
            };
        }
        let local = local.and_then(Result::ok);
        if let Some(found) = &local
            && Commit::new(reference.revision()).is_some()
            && reference.quant().is_some()
        {
            return Ok(found.clone());
        }
        let http = self.http().await?;
        let tries = if local.is_some() { 1 } else { settings.limits.tries };
        match (http.insist(tries, || self.list(http, reference)).await, local) {
            (Err(error), Some(found)) if error.is_transient() => {
                tracing::warn!(%error, commit = found.commit(), "the hub can't be asked; taking what is here");
                Ok(found)
            }
            (list, _) => list,
        }
    }

    async fn list(&self, http: &Http, reference: &Reference) -> Result<Found, HubError> {
        let (repo, revision) = (reference.repo(), reference.revision());
        let what = format!("{repo} at {revision}");
        let name = FileName::new(revision)?.in_url().replace('/', "%2F");
        let asked = Asked { what: &what, repo };
        let answer =
            http.ask(&asked, Method::GET, &format!("api/models/{repo}/revision/{name}"), 0, Follow::Hub).await?;
        let body = http.read(&what, answer.into_body(), LIST_BYTES_MAX).await?;
        let strange = |problem: String| HubError::Strange { what: what.clone(), problem };
        let info: RepoInfo = serde_json::from_slice(&body).map_err(|error| strange(error.to_string()))?;
        let commit = Commit::new(&info.sha).ok_or_else(|| strange("its commit has no name".into()))?;
        let names: Vec<String> = info.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        let choice = choose(reference, &names)?;
        Ok(Found { reference: reference.clone(), commit, model: choice.model, side: choice.side })
    }

    /// Asks what a file's content is.
    async fn blob(&self, http: &Http, cache: &RepoCache, found: &Found, name: &FileName) -> Result<Blob, HubError> {
        let repo = found.reference.repo();
        let what = format!("{repo}/{}", name.as_str());
        let asked = Asked { what: &what, repo };
        let path = url_path(found, name);
        let answer = http.ask(&asked, Method::HEAD, &path, 0, Follow::Hub).await?;
        let header = |name: &str| answer.headers().get(name).and_then(|value| value.to_str().ok());
        let strange = |problem: &str| HubError::Strange { what: what.clone(), problem: problem.into() };
        let etag = header("x-linked-etag").or_else(|| header("etag")).and_then(Etag::new);
        let etag = etag.ok_or_else(|| strange("it has no hash to verify a content by"))?;
        // The length of an answer that leads elsewhere is not the file's.
        let own = || header("content-length").filter(|_| answer.status().is_success());
        let size = header("x-linked-size").or_else(own).and_then(|text| text.parse().ok());
        let size = size.ok_or_else(|| strange("it has no length"))?;
        Ok(Blob { what, folder: cache.blobs(), etag, size })
    }

    /// Fetches what is missing of the files; returns where the model's first file is. Dropping the future stops it, and what
    /// came so far is gone on with next time.
    ///
    /// # Errors
    /// [`HubError`]; no file has its final name unless it is whole and verified.
    pub async fn fetch(&self, found: &Found, report: Report<'_>) -> Result<PathBuf, HubError> {
        let cache = self.cache(&found.reference)?;
        let first = found
            .model
            .first()
            .ok_or_else(|| HubError::Choice { reference: found.reference.to_string(), choices: Vec::new() })?;
        let path = cache.pointer(&found.commit, first);
        let missing: Vec<&FileName> = found.files().filter(|name| !cache.has(&found.commit, name)).collect();
        let revision = found.reference.revision();
        if missing.is_empty() {
            // The cache may be one that can only be read.
            let _ = cache.set_ref(revision, &found.commit);
            return Ok(path);
        }
        let limits = &self.inner.settings.limits;
        let http = self.http().await?;
        let mut blobs = Vec::new();
        for name in missing {
            let blob = http.insist(limits.tries, || self.blob(http, &cache, found, name)).await?;
            blobs.push((name, blob));
        }
        self.room(&cache, found, blobs.iter().map(|(_, blob)| blob))?;
        let total = blobs.iter().map(|(_, blob)| blob.size).sum();
        let mut before = 0;
        for (name, blob) in blobs {
            let (size, etag) = (blob.size, blob.etag.clone());
            if !blob.is_here() {
                let watch = |done: u64, fresh: u64| report(Pulled { done: before + done, total, fresh });
                let lock = cache.lock(&blob.etag);
                let order = Order { repo: found.reference.repo(), url_path: url_path(found, name), blob, lock };
                transfer(http, &order, limits, &watch).await?;
            }
            cache.link(&found.commit, name, &etag)?;
            before += size;
            report(Pulled { done: before, total, fresh: 0 });
        }
        // Last, so that a revision never means a commit of which half is here.
        cache.set_ref(revision, &found.commit)?;
        Ok(path)
    }

    /// Checks that the disk has room for what is still to come.
    fn room<'a>(
        &self,
        cache: &RepoCache,
        found: &Found,
        blobs: impl Iterator<Item = &'a Blob>,
    ) -> Result<(), HubError> {
        let mut needed = 0u64;
        for blob in blobs.filter(|blob| !blob.is_here()) {
            needed = needed.saturating_add(blob.size.saturating_sub(length(&blob.incomplete())?));
        }
        let (folder, reserve) = (cache.blobs(), self.inner.settings.limits.disk_reserve);
        std::fs::create_dir_all(&folder).map_err(|source| HubError::Io { path: folder.clone(), source })?;
        let free = free_bytes(&folder)?;
        if needed > 0 && free < needed.saturating_add(reserve) {
            return Err(HubError::Room { what: found.reference.to_string(), folder, needed, free, reserve });
        }
        Ok(())
    }

    /// Finds and fetches in one.
    ///
    /// # Errors
    /// As [`Hub::find`] and [`Hub::fetch`].
    pub async fn pull(&self, reference: &Reference, report: Report<'_>) -> Result<PathBuf, HubError> {
        self.fetch(&self.find(reference).await?, report).await
    }
}

fn url_path(found: &Found, name: &FileName) -> String {
    format!("{}/resolve/{}/{}", found.reference.repo(), found.commit.as_str(), name.in_url())
}
