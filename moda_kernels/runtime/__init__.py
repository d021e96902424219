"""What everything stands on: checks, the native extension, operators, GPUs, the compiler."""
