def write_assign_report(folder, settings): pass
def write_sft_report(folder, settings): pass
