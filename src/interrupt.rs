//! Ctrl-C: once ends the running cell and the run in good order, twice ends everything at once.

use anyhow::{Context, Result};
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// The exit code of a run that was interrupted, as shells have it for SIGINT.
pub const EXIT_CODE: u8 = 130;

pub fn requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}

/// Interrupts another evalfw that this one has started. At a terminal it has heard of it already.
#[cfg(unix)]
pub fn pass_on(child: &mut Child) -> std::io::Result<()> {
    use rustix::process::{Pid, Signal, kill_process};
    // One that has ended needs no signal.
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw)
        && child.try_wait()?.is_none()
    {
        kill_process(pid, Signal::INT)?;
    }
    Ok(())
}

#[cfg(not(unix))]
pub fn pass_on(child: &mut Child) -> std::io::Result<()> {
    child.kill()
}

/// Installs the handler for SIGINT, SIGTERM and SIGHUP.
pub fn install() -> Result<()> {
    ctrlc::set_handler(|| {
        if REQUESTED.swap(true, Ordering::Relaxed) {
            crate::worker::kill_all();
            std::process::exit(EXIT_CODE.into());
        }
    })
    .context("the handler for Ctrl-C could not be installed")
}
