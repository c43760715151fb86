//! Files in the cache folder that are about one adapter.

use std::io::Write;
use std::path::Path;

/// A part of a path, of letters, digits, dots and dashes. Different names may become one, so that the file itself has to
/// say what it is about.
pub fn path_part(name: &str) -> String {
    let known = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c.to_ascii_lowercase() } else { '-' };
    let part: String = name.trim().chars().map(known).take(120).collect();
    match part.trim_matches(['-', '.']) {
        "" => "unnamed".to_owned(),
        part => part.to_owned(),
    }
}

/// Writes a file, and its folder. It is there whole at once, for another worker may be reading it.
pub fn write_whole(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(content)?;
    file.persist(path)?;
    Ok(())
}

/// A GPU for tests of such files.
#[cfg(test)]
pub fn gpu(name: &str, driver: &str) -> evalfw_engine::protocol::DeviceInfo {
    evalfw_engine::protocol::DeviceInfo {
        kind: evalfw_engine::protocol::DeviceKind::DiscreteGpu,
        name: name.to_owned(),
        driver: Some(driver.to_owned()),
        software: false,
        memory_bytes: None,
    }
}
