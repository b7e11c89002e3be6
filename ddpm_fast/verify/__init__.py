"""Every operator, backend, dtype and layout against float64."""
