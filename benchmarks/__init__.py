"""What each step costs on this machine, measured in one run with what it is compared to."""
