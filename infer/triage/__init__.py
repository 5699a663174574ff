"""Pages for triage: the lesions of a patient that an ensemble scores highest, and why."""
