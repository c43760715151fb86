use std::process::ExitCode;

fn main() -> ExitCode {
    evalfw::cli::main()
}
