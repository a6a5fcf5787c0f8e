"""What more than one test module uses: tiny models, slow versions, oracles, and ``families`` with a case per family."""
