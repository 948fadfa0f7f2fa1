"""Facts about the machine this runs on."""
