"""compute-sanitizer over every kernel of the library: what each case launches, watched on the hardware itself."""
