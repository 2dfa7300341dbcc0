//! Instructions that a running program takes, counted by callgrind, a window at a time.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// A program that callgrind counts.
pub(crate) struct Counted {
    process: u32,
    /// What its files begin with.
    prefix: PathBuf,
    dumps: u32,
}

/// Words that run a program under callgrind, which does not count before it is told to.
pub(crate) fn words(prefix: &Path) -> Vec<String> {
    let mut words = vec!["valgrind".to_owned()];
    // The rig's programs are scripts that become the program.
    words.extend(["-q", "--tool=callgrind", "--trace-children=yes", "--separate-threads=yes"].map(str::to_owned));
    words.extend(["--fair-sched=yes", "--instr-atstart=no"].map(str::to_owned));
    words.push(format!("--callgrind-out-file={}", prefix.display()));
    words
}

/// Whether valgrind is there.
pub(crate) fn find() -> Result<()> {
    let found = Command::new("valgrind").arg("--version").output();
    ensure!(found.is_ok_and(|output| output.status.success()), "valgrind is not there: run tests/rig/make");
    Ok(())
}

impl Counted {
    /// The program with this process, which was started with [`words`] of this prefix.
    pub(crate) const fn new(process: u32, prefix: PathBuf) -> Self {
        Self { process, prefix, dumps: 0 }
    }

    fn tell(&self, words: &[&str]) -> Result<()> {
        let output = Command::new("vgdb").arg(format!("--pid={}", self.process)).args(words).output()?;
        ensure!(output.status.success(), "vgdb {words:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// Instructions of each packet, or request, of those that `passed` counts, in several windows.
    pub(crate) fn windows(
        &mut self,
        count: usize,
        window: Duration,
        mut passed: impl FnMut() -> u64,
    ) -> Result<Vec<f64>> {
        self.tell(&["instrumentation", "on"])?;
        let mut figures = Vec::new();
        for _ in 0..count {
            self.tell(&["zero"])?;
            let before = passed();
            std::thread::sleep(window);
            let passed = passed() - before;
            self.tell(&["dump"])?;
            self.dumps += 1;
            ensure!(passed > 0, "nothing passed in {} ms", window.as_millis());
            figures.push(self.instructions()? / passed as f64);
        }
        self.tell(&["instrumentation", "off"])?;
        Ok(figures)
    }

    /// Instructions of the busiest thread in the last window: the one that polls.
    fn instructions(&self) -> Result<f64> {
        let folder = self.prefix.parent().context("the files are in a folder")?;
        let start = format!("{}.{}-", self.prefix.file_name().context("files have names")?.display(), self.dumps);
        let mut most = 0.0f64;
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(&start) {
                let text = std::fs::read_to_string(entry.path())?;
                let totals = text.lines().find_map(|line| line.strip_prefix("totals: ")?.parse().ok());
                most = most.max(totals.unwrap_or_default());
            }
        }
        ensure!(most > 0.0, "callgrind counted nothing");
        Ok(most)
    }
}
