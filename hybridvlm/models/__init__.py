"""Model families: a package each, with what `hybridvlm.models.family.Family` lists. nemotron_vl/ is the one to read first."""
