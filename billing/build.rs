//! New migration files are new code.

fn main() {
    println!("cargo:rerun-if-changed=migrations");
}
