//! Breadcrumbs: before a step, which requests it runs, so that the next life can say what this one died of.
//!
//! The file is small, rewritten in place and only when the step's requests change; it is never synced, for the page
//! cache outlives the process. A clean end removes it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use words::{CRUMBS_MAX, Fingerprint, ModelId};

const PREFIX: &str = "running-";
/// Bytes of one crumb in the file: its text and a line feed.
const LINE: usize = 65;

/// The trail of one model's engine.
#[derive(Debug)]
pub(crate) struct Crumbs {
    trail: Option<(PathBuf, File)>,
    laid: Vec<Fingerprint>,
}

impl Crumbs {
    /// Begins a trail in the state directory; without one there is none.
    pub(crate) fn begin(state_dir: Option<&Path>, model: &ModelId) -> Self {
        let open = |folder: &Path| {
            let name = blake3::hash(model.as_str().as_bytes()).to_hex();
            let path = folder.join(format!("{PREFIX}{}", &name[..16]));
            match File::create(&path) {
                Ok(file) => Some((path, file)),
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "crashes of this model will leave no breadcrumb");
                    None
                }
            }
        };
        Crumbs { trail: state_dir.and_then(open), laid: Vec::new() }
    }

    /// Whether anything is written at all.
    pub(crate) fn active(&self) -> bool {
        self.trail.is_some()
    }

    /// Names the requests of the step that is about to run.
    pub(crate) fn lay(&mut self, names: impl Iterator<Item = Fingerprint>) {
        let Some((_, file)) = &self.trail else { return };
        let mut fresh: Vec<Fingerprint> = names.take(CRUMBS_MAX).collect();
        fresh.sort_unstable();
        fresh.dedup();
        if fresh == self.laid {
            return;
        }
        let text: String = fresh.iter().map(|print| format!("{print}\n")).collect();
        let written = file.write_all_at(text.as_bytes(), 0).and_then(|()| file.set_len(text.len() as u64));
        if let Err(error) = written {
            tracing::debug!(%error, "a breadcrumb could not be written");
        }
        self.laid = fresh;
    }

    /// Takes up the trails that earlier lives left; each is read once.
    pub(crate) fn collect(state_dir: &Path) -> Vec<Fingerprint> {
        let mut found = Vec::new();
        let entries = std::fs::read_dir(state_dir).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX)) {
            let mut text = vec![0; LINE * CRUMBS_MAX];
            let read = File::open(entry.path()).and_then(|file| std::io::Read::read(&mut { file }, &mut text));
            text.truncate(read.unwrap_or(0));
            let text = String::from_utf8_lossy(&text);
            found.extend(text.lines().filter_map(|line| line.parse::<Fingerprint>().ok()));
            let _ = std::fs::remove_file(entry.path());
        }
        found.truncate(CRUMBS_MAX);
        found
    }
}

impl Drop for Crumbs {
    fn drop(&mut self) {
        if let Some((path, _)) = &self.trail {
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_crash_leaves_the_names_of_its_step_and_a_clean_end_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (Fingerprint([1; 32]), Fingerprint([2; 32]));
        let model = ModelId::new("org/m").unwrap();
        let mut crumbs = Crumbs::begin(Some(folder.path()), &model);
        crumbs.lay([b, a, b].into_iter());
        crumbs.lay([b].into_iter());
        std::mem::forget(crumbs);
        assert_eq!(Crumbs::collect(folder.path()), [b]);
        assert_eq!(Crumbs::collect(folder.path()), []);
        let mut clean = Crumbs::begin(Some(folder.path()), &model);
        clean.lay([a].into_iter());
        drop(clean);
        assert_eq!(Crumbs::collect(folder.path()), []);
        assert!(!Crumbs::begin(None, &model).active());
    }
}
