"""From a fold's checkpoint to an engine that has passed the parity gate on the machine that will run it."""
