use std::process::ExitCode;
#[derive(clap::Args)]
pub struct ReportArgs {
    run: std::path::PathBuf,
}
pub fn run(args: &ReportArgs) -> anyhow::Result<ExitCode> {
    crate::record::read(&args.run)?;
    Ok(ExitCode::SUCCESS)
}
