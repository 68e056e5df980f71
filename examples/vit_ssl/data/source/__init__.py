"""Where the images of a run come from: found out, looked at before the first step, kept with the run."""
