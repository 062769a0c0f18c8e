"""Pages on which features are looked at: what they fire on, what they do, and whether other members have them too."""
