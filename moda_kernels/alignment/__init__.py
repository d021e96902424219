"""Duplex alignment: keys mapped into the other modalities' space (spec: "Duplex alignment")."""
