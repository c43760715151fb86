//! A folder that appears whole or not at all.

use crate::model::{Error, Result};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Held by the process that fills the folder, so that a second one waits, and so that what a killed one
/// left behind is told apart from what a living one is writing.
const LOCK_FILE: &str = "writer.lock";

/// A temporary folder beside the target, which takes the target's name once it is complete.
#[derive(Debug)]
pub struct Staging {
    target: PathBuf,
    dir: PathBuf,
    committed: bool,
    /// The lock lasts as long as the file is open.
    _lock: File,
}

impl Staging {
    /// Makes the temporary folder, empty. Waits while another process fills the same target; the
    /// caller should look afterwards whether that has left nothing to do.
    pub fn claim(target: &Path) -> Result<Self> {
        let target = std::path::absolute(target).map_err(Error::io(target))?;
        let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
            return Err(Error::file(&target, "cannot be replaced; name a folder below it"));
        };
        let dir = parent.join(format!(".{}.partial", name.to_string_lossy()));
        let lock = loop {
            if let Some(lock) = lock(&dir)? {
                break lock;
            }
        };
        let staging = Self { target, dir, committed: false, _lock: lock };
        staging.clear()?;
        Ok(staging)
    }

    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Gives the folder its final name. The target must not exist or be empty.
    pub fn commit(mut self) -> Result<()> {
        fs::rename(&self.dir, &self.target).map_err(Error::io(&self.target))?;
        self.committed = true;
        let lock = self.target.join(LOCK_FILE);
        fs::remove_file(&lock).map_err(Error::io(&lock))
    }

    /// Removes what a killed process has left.
    fn clear(&self) -> Result<()> {
        for entry in fs::read_dir(&self.dir).map_err(Error::io(&self.dir))? {
            let path = entry.map_err(Error::io(&self.dir))?.path();
            if path.is_dir() {
                fs::remove_dir_all(&path).map_err(Error::io(&path))?;
            } else if path.file_name() != Some(LOCK_FILE.as_ref()) {
                fs::remove_file(&path).map_err(Error::io(&path))?;
            }
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.committed {
            // An error is on its way already, and what stays here is cleared by the next attempt.
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// Waits for the lock in `dir`. `None` if its last holder removed or renamed the folder meanwhile.
fn lock(dir: &Path) -> Result<Option<File>> {
    fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let path = dir.join(LOCK_FILE);
    let file = match File::create(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        other => other.map_err(Error::io(&path))?,
    };
    file.lock().map_err(Error::io(&path))?;
    Ok(path.exists().then_some(file))
}

/// Bytes that this user may still write on the file system of `path`; `None` where it cannot be asked.
pub fn free_bytes(path: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        let stat = rustix::fs::statvfs(path).ok()?;
        Some(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn the_target_appears_at_the_commit_with_nothing_but_what_was_written() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("a/model");
        let staging = Staging::claim(&target).unwrap();
        fs::write(staging.path().join("file"), "x").unwrap();
        assert!(!target.exists());
        staging.commit().unwrap();
        let entries =
            |dir: &Path| fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>();
        assert_eq!(entries(&target), ["file"]);
        assert_eq!(entries(&root.path().join("a")), ["model"]);
    }

    #[test]
    fn an_abandoned_attempt_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let staging = Staging::claim(&root.path().join("model")).unwrap();
        fs::write(staging.path().join("file"), "x").unwrap();
        drop(staging);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_process_left_is_cleared() {
        let root = tempfile::tempdir().unwrap();
        let left = root.path().join(".model.partial");
        fs::create_dir_all(left.join("folder")).unwrap();
        fs::write(left.join("model.safetensors"), "half").unwrap();
        fs::write(left.join(LOCK_FILE), "").unwrap();
        let staging = Staging::claim(&root.path().join("model")).unwrap();
        staging.commit().unwrap();
        assert_eq!(fs::read_dir(root.path().join("model")).unwrap().count(), 0);
    }

    #[test]
    fn a_second_writer_waits_for_the_first() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("model");
        let first = Staging::claim(&target).unwrap();
        let committed = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let second = scope.spawn(|| {
                let staging = Staging::claim(&target).unwrap();
                (staging, committed.load(Ordering::SeqCst))
            });
            fs::write(first.path().join("file"), "x").unwrap();
            committed.store(true, Ordering::SeqCst);
            first.commit().unwrap();
            let (staging, was_committed) = second.join().unwrap();
            assert!(was_committed);
            assert!(target.join("file").exists());
            drop(staging);
        });
        assert!(target.join("file").exists());
    }

    #[test]
    #[cfg(unix)]
    fn free_space_is_known_for_an_existing_folder_only() {
        let root = tempfile::tempdir().unwrap();
        assert!(free_bytes(root.path()).unwrap() > 0);
        assert_eq!(free_bytes(&root.path().join("missing")), None);
    }
}
