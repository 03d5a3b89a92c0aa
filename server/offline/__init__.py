"""One adapter beside its base, without a server: compared with peft, or merged by it."""
