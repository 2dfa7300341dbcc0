//! Compiles the definition with a compiler written in Rust, so that no build needs `protoc` installed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=dray");
    let definition = protox::compile(["dray/v1/card.proto"], ["."])?;
    tonic_prost_build::configure().compile_fds(definition)?;
    Ok(())
}
