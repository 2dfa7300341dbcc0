//! An archive that is unpacked over a guest's root: programs of this machine, and modules of the guest's kernel that few guests need.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A root in the making.
#[derive(Debug)]
pub struct Archive {
    root: PathBuf,
}

impl Archive {
    /// An empty one, whose files are kept in `folder`.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        Self { root: folder.join("archive") }
    }

    /// Adds `lib/modules/NAME.ko`, out of the rig.
    ///
    /// # Panics
    /// When the rig's kernel has no such module.
    pub fn add_module(&self, rig: &Path, name: &str) {
        let found =
            run(Command::new("find").arg(rig.join("root/usr/lib/modules")).args(["-name", &format!("{name}.ko.xz")]))
                .stdout;
        let found = String::from_utf8(found).unwrap();
        let module = run(Command::new("xz").args(["-dc", found.trim()])).stdout;
        std::fs::write(self.place(&format!("lib/modules/{name}.ko")), module).unwrap();
    }

    /// Adds `bin/NAME`, a program of this machine, with its loader and libraries in the place of the guest's: programs of the guest
    /// that are linked to those may not run any more.
    ///
    /// # Panics
    /// When it is no such program.
    pub fn add_program(&self, program: &Path, name: &str) {
        let copy = self.place(&format!("bin/{name}"));
        run(Command::new("strip").arg("-o").arg(copy).arg(program));
        let libraries = String::from_utf8(run(Command::new("ldd").arg(program)).stdout).unwrap();
        for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
            let file = Path::new(library).file_name().unwrap().to_str().unwrap();
            let folder = if file.starts_with("ld-") { "lib64" } else { "usr/lib/x86_64-linux-gnu" };
            std::fs::copy(library, self.place(&format!("{folder}/{file}"))).unwrap();
        }
    }

    /// Packs it; returns where.
    ///
    /// # Panics
    /// When there is no room for it.
    #[must_use]
    pub fn pack(&self) -> PathBuf {
        let archive = self.root.with_extension("cpio");
        let script = "find . -mindepth 1 | cpio -o -H newc --quiet >\"$0\"";
        run(Command::new("sh").args(["-c", script]).arg(&archive).current_dir(&self.root));
        archive
    }

    /// A path in the root, whose folder is made.
    fn place(&self, path: &str) -> PathBuf {
        let place = self.root.join(path);
        std::fs::create_dir_all(place.parent().unwrap()).unwrap();
        place
    }
}

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}
