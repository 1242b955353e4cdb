//! The folder of the cache: `models--org--repo/{blobs,refs,snapshots}`, as `huggingface_hub` has it.

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use crate::digest::Etag;
use crate::names::{Commit, FileName};
use crate::{HubError, Reference};

/// Most files of a snapshot that are looked at.
const FILES_MAX: usize = 10_000;
/// Deepest folder of a snapshot that is looked at.
const DEPTH_MAX: usize = 8;
/// Most bytes of a ref's file.
const REF_BYTES_MAX: u64 = 256;

/// One repo's part of the cache.
pub(crate) struct RepoCache {
    folder: PathBuf,
    locks: PathBuf,
    layout: CacheRepo,
}

fn at<'a>(path: &'a Path) -> impl FnOnce(std::io::Error) -> HubError + 'a {
    move |source| HubError::Io { path: path.into(), source }
}

impl RepoCache {
    pub(crate) fn new(cache: &Path, reference: &Reference) -> Self {
        let repo = Repo::with_revision(reference.repo().into(), RepoType::Model, reference.revision().into());
        let name = repo.folder_name();
        RepoCache {
            folder: cache.join(&name),
            locks: cache.join(".locks").join(&name),
            layout: Cache::new(cache.into()).repo(repo),
        }
    }

    pub(crate) fn blobs(&self) -> PathBuf {
        self.folder.join("blobs")
    }

    pub(crate) fn lock(&self, etag: &Etag) -> PathBuf {
        self.locks.join(format!("{}.lock", etag.as_str()))
    }

    fn snapshot(&self, commit: &Commit) -> PathBuf {
        self.layout.pointer_path(commit.as_str())
    }

    /// Returns where a file of a commit is, or would be.
    pub(crate) fn pointer(&self, commit: &Commit, name: &FileName) -> PathBuf {
        name.under(&self.snapshot(commit))
    }

    /// Returns whether a file of a commit is whole and here.
    pub(crate) fn has(&self, commit: &Commit, name: &FileName) -> bool {
        // A link to a blob that is gone is no file.
        std::fs::metadata(self.pointer(commit, name)).is_ok_and(|metadata| metadata.is_file())
    }

    fn ref_path(&self, revision: &str) -> Option<PathBuf> {
        Some(FileName::new(revision).ok()?.under(&self.folder.join("refs")))
    }

    /// Returns the commit that a revision meant when it was last asked for.
    pub(crate) fn commit(&self, revision: &str) -> Option<Commit> {
        if let Some(commit) = Commit::new(revision) {
            return Some(commit);
        }
        let path = self.ref_path(revision)?;
        let fits = std::fs::metadata(&path).is_ok_and(|metadata| metadata.len() <= REF_BYTES_MAX);
        fits.then(|| Commit::new(std::fs::read_to_string(path).ok()?.trim())).flatten()
    }

    /// Lists the files of a commit that are here.
    pub(crate) fn files(&self, commit: &Commit) -> Vec<String> {
        let root = self.snapshot(commit);
        let (mut found, mut open) = (Vec::new(), vec![(root.clone(), 0)]);
        while let Some((folder, depth)) = open.pop() {
            for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
                let path = entry.path();
                let Ok(metadata) = std::fs::metadata(&path) else { continue };
                if metadata.is_dir() && depth < DEPTH_MAX {
                    open.push((path, depth + 1));
                } else if metadata.is_file()
                    && let Some(name) = path.strip_prefix(&root).ok().and_then(Path::to_str)
                {
                    found.push(name.to_string());
                }
                if found.len() >= FILES_MAX {
                    return found;
                }
            }
        }
        found
    }

    /// Lets a commit's file be a blob.
    ///
    /// # Errors
    /// `Io`; also when a folder on the way is a link, which nobody who keeps this layout makes.
    pub(crate) fn link(&self, commit: &Commit, name: &FileName, etag: &Etag) -> Result<(), HubError> {
        let snapshot = self.snapshot(commit);
        let pointer = self.pointer(commit, name);
        let folder = pointer.parent().unwrap_or(&snapshot);
        std::fs::create_dir_all(folder).map_err(at(folder))?;
        let mut target = PathBuf::new();
        for above in folder.ancestors().take_while(|above| above.starts_with(&snapshot)) {
            if std::fs::symlink_metadata(above).map_err(at(above))?.file_type().is_symlink() {
                return Err(at(above)(std::io::Error::other("a link where a folder of the cache should be")));
            }
            target.push("..");
        }
        // From `snapshots/<commit>` it is two up, and one for each folder in it.
        let target = target.join("..").join("blobs").join(etag.as_str());
        let fresh = folder.join(format!(".{:016x}.link", rand::random::<u64>()));
        std::os::unix::fs::symlink(&target, &fresh).map_err(at(&fresh))?;
        std::fs::rename(&fresh, &pointer).map_err(|source| {
            let _ = std::fs::remove_file(&fresh);
            at(&pointer)(source)
        })
    }

    /// Keeps which commit a revision means.
    ///
    /// # Errors
    /// `Io`.
    pub(crate) fn set_ref(&self, revision: &str, commit: &Commit) -> Result<(), HubError> {
        if Commit::new(revision).is_some() || self.commit(revision).as_ref() == Some(commit) {
            return Ok(());
        }
        let Some(path) = self.ref_path(revision) else { return Ok(()) };
        let folder = path.parent().unwrap_or(&self.folder);
        std::fs::create_dir_all(folder).map_err(at(folder))?;
        let fresh = folder.join(format!(".{:016x}.ref", rand::random::<u64>()));
        let write = || {
            let mut file = std::fs::File::create(&fresh)?;
            file.write_all(commit.as_str().as_bytes())?;
            file.sync_all()?;
            std::fs::rename(&fresh, &path)
        };
        write().map_err(|source| {
            let _ = std::fs::remove_file(&fresh);
            at(&path)(source)
        })
    }
}

/// Returns the bytes that a user may still write to a folder's disk.
pub(crate) fn free_bytes(folder: &Path) -> Result<u64, HubError> {
    let facts = rustix::fs::statvfs(folder).map_err(|error| at(folder)(error.into()))?;
    Ok(facts.f_bavail.saturating_mul(facts.f_frsize))
}

/// Returns the length of a file; 0 when there is none.
pub(crate) fn length(path: &Path) -> Result<u64, HubError> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(metadata.len()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(0),
        Err(error) => Err(at(path)(error)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const COMMIT: &str = "0123456789012345678901234567890123456789";

    fn cache(folder: &Path) -> (RepoCache, Commit) {
        (RepoCache::new(folder, &Reference::parse("org/repo").unwrap()), Commit::new(COMMIT).unwrap())
    }

    #[test]
    fn what_is_linked_is_found_by_hf_hub_too() {
        let folder = tempfile::tempdir().unwrap();
        let (cache, commit) = cache(folder.path());
        let etag = Etag::new(&"ab".repeat(20)).unwrap();
        std::fs::create_dir_all(cache.blobs()).unwrap();
        std::fs::write(cache.blobs().join(etag.as_str()), "content").unwrap();
        for name in ["m.gguf", "a/b/m.gguf"] {
            let name = FileName::new(name).unwrap();
            assert!(!cache.has(&commit, &name));
            cache.link(&commit, &name, &etag).unwrap();
            cache.link(&commit, &name, &etag).unwrap();
            assert!(cache.has(&commit, &name));
            assert!(std::fs::read_link(cache.pointer(&commit, &name)).unwrap().is_relative());
        }
        cache.set_ref("main", &commit).unwrap();
        let found = Cache::new(folder.path().into()).model("org/repo".into()).get("a/b/m.gguf").unwrap();
        assert_eq!(std::fs::read_to_string(found).unwrap(), "content");
        let mut files = cache.files(&cache.commit("main").unwrap());
        files.sort();
        assert_eq!(files, ["a/b/m.gguf", "m.gguf"]);
    }

    #[test]
    fn a_link_in_place_of_a_folder_leads_nowhere() {
        let (folder, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (cache, commit) = cache(folder.path());
        let snapshot = cache.snapshot(&commit);
        std::fs::create_dir_all(&snapshot).unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), snapshot.join("a")).unwrap();
        let etag = Etag::new(&"ab".repeat(20)).unwrap();
        assert!(cache.link(&commit, &FileName::new("a/m.gguf").unwrap(), &etag).is_err());
        assert_eq!(std::fs::read_dir(elsewhere.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_damaged_ref_means_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (cache, commit) = cache(folder.path());
        cache.set_ref("main", &commit).unwrap();
        assert_eq!(cache.commit("main"), Some(commit.clone()));
        std::fs::write(cache.folder.join("refs/main"), "../../../etc").unwrap();
        assert_eq!(cache.commit("main"), None);
        assert_eq!(cache.commit(COMMIT), Some(commit));
    }
}
