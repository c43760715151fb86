//! What engines on the CPU say of their device.

/// The processor's name as the operating system has it, or its architecture.
pub fn cpu_name() -> String {
    let found = if cfg!(target_os = "linux") {
        std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| model_name(&text))
    } else if cfg!(target_os = "macos") {
        let output = std::process::Command::new("sysctl").args(["-n", "machdep.cpu.brand_string"]).output();
        output.ok().and_then(|output| String::from_utf8(output.stdout).ok())
    } else {
        std::env::var("PROCESSOR_IDENTIFIER").ok()
    };
    match found.map(|name| name.trim().to_owned()) {
        Some(name) if !name.is_empty() => name,
        _ => std::env::consts::ARCH.to_owned(),
    }
}

/// The value of the first `model name` line.
fn model_name(cpuinfo: &str) -> Option<String> {
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"))?;
    line.split_once(':').map(|(_, name)| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_the_cpu_is_cut_out_of_cpuinfo() {
        let text = "processor\t: 0\nmodel\t\t: 17\nmodel name\t: Some CPU @ 3 GHz\nmodel name\t: other\n";
        assert_eq!(model_name(text).unwrap().trim(), "Some CPU @ 3 GHz");
        assert_eq!(model_name("Hardware: none"), None);
    }
}
