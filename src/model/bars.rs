//! Progress bars for bytes, on stderr; indicatif hides them when that is not a terminal.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar for `total` bytes that stays on screen when it is finished.
pub fn bytes(name: &str, total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total).with_message(name.to_owned());
    let template = "{msg} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}
