"""From a notice to the emergency save: where it comes from, what time allows, where all processes stop."""
