"""Whether it holds: `check` for a submission folder, `doctor` for a machine before a paid run."""
