"""Records of several processes in one folder."""

from kd.generation.records import append_record, cut_torn_lines, read_records, record_file


def test_records_of_all_ranks_are_read_but_none_of_a_longer_stem(tmp_path):
    for stem, rank in (("student", 0), ("student", 12), ("student-2", 0), ("student-2", 1)):
        with open(record_file(str(tmp_path), stem, rank), "a") as file:
            append_record(file, {"stem": stem, "rank": rank})
            file.write("torn")
    assert cut_torn_lines(str(tmp_path), "student") == 2 * len("torn")
    rows = read_records(str(tmp_path), "student")
    assert sorted(row["rank"] for row in rows) == [0, 12]
    assert {row["stem"] for row in rows} == {"student"}
    assert cut_torn_lines(str(tmp_path), "student-2") == 2 * len("torn")
