"""UCF-101 and MSR-VTT in their published layouts."""

import json

import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.data.ingest.formats import Listing, ListingOptions, list_clips
from dit_video.data.ingest.formats.published import format_class_name
from support.clip_folders import write_files


def facts(listing: Listing) -> list[tuple[str, tuple[str, ...], str]]:
    return [(clip.name, clip.captions, clip.split) for clip in listing.clips]


UCF101 = {
    "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi": b"test",
    "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi": b"train",
    "UCF-101/HandstandPushups/v_HandStandPushups_g08_c01.avi": b"",
    "UCF-101/YoYo/v_YoYo_g08_c01.avi": b"",
    "ucfTrainTestlist/classInd.txt": "1 ApplyEyeMakeup\r\n37 HandstandPushups\r\n101 YoYo\r\n",
    "ucfTrainTestlist/trainlist01.txt": (
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\r\nHandstandPushups/v_HandstandPushups_g08_c01.avi 37\r\n"
    ),
    "ucfTrainTestlist/testlist01.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\r\nYoYo/v_YoYo_g08_c01.avi\r\n",
    "ucfTrainTestlist/trainlist03.txt": "YoYo/v_YoYo_g08_c01.avi 101\n\n",
    "ucfTrainTestlist/testlist03.txt": "HandStandPushups/v_HandStandPushups_g08_c01.avi\nYoYo/v_YoYo_g01_c09.avi\n",
}
MAKEUP, PUSHUPS, YOYO = "apply eye makeup", "handstand pushups", "yo yo"


def test_ucf101_is_listed_with_its_class_names(tmp_path):
    write_files(tmp_path, UCF101)
    listing = list_clips(tmp_path)
    names = [name for name in UCF101 if name.endswith(".avi")]
    assert facts(listing) == [
        (names[1], (MAKEUP,), "train"),
        (names[2], (PUSHUPS,), "train"),
        (names[0], (MAKEUP,), "test"),
        (names[3], (YOYO,), "test"),
    ]
    assert (listing.format, listing.unlisted, listing.rejected) == ("ucf101", (), ())
    assert listing.clips[0].read() == b"train"


def test_another_pair_of_ucf101_lists_can_be_chosen(tmp_path):
    write_files(tmp_path, UCF101)
    listing = list_clips(tmp_path, options=ListingOptions(ucf101_split=3))
    names = [name for name in UCF101 if name.endswith(".avi")]
    assert facts(listing) == [(names[3], (YOYO,), "train"), (names[2], (PUSHUPS,), "test")]
    assert listing.unlisted == (names[0], names[1])
    assert listing.rejected == (("YoYo/v_YoYo_g01_c09.avi", "testlist03.txt names it, but it is not there"),)
    with pytest.raises(MissingError, match=r"holds no trainlist02\.txt; put the folder ucfTrainTestlist"):
        list_clips(tmp_path, options=ListingOptions(ucf101_split=2))


def test_converted_and_copied_ucf101_files_are_found(tmp_path):
    write_files(tmp_path, UCF101)
    names = [name for name in UCF101 if name.endswith(".avi")]
    converted = "UCF-101/YoYo/v_YoYo_g08_c01.mp4"
    (tmp_path / names[3]).rename(tmp_path / converted)
    write_files(tmp_path, {"copy/YoYo/v_yoyo_g08_c01.avi": b""})
    listing = list_clips(tmp_path)
    assert facts(listing)[-1] == (converted, (YOYO,), "test")
    assert listing.rejected == (("copy/YoYo/v_yoyo_g08_c01.avi", f"is the same clip of UCF-101 as '{converted}'"),)


def test_bad_lines_of_ucf101_reject_only_themselves(tmp_path):
    again = UCF101["ucfTrainTestlist/trainlist01.txt"].encode()
    write_files(
        tmp_path,
        UCF101
        | {
            "ucfTrainTestlist/classInd.txt": "1 ApplyEyeMakeup\n\nHandstandPushups\n101 YoYo\n",
            "ucfTrainTestlist/testlist01.txt": b"\n" + again + b"YoYo/\xe9.avi\nYoYo/v_YoYo_g08_c01.avi\nx.avi\n",
        },
    )
    listing = list_clips(tmp_path)
    names = [name for name in UCF101 if name.endswith(".avi")]
    assert facts(listing) == [(names[1], (MAKEUP,), "train"), (names[3], (YOYO,), "test")]
    makeup, pushups = "'ApplyEyeMakeup/v_ApplyEyeMakeup", "'HandstandPushups/v_HandstandPushups"
    assert listing.rejected == (
        ("classInd.txt, line 3", "is not a number and a class, as 1 ApplyEyeMakeup"),
        ("trainlist01.txt, line 2", f"{pushups}_g08_c01.avi' lies in no class of classInd.txt"),
        ("testlist01.txt, line 2", f"{makeup}_g08_c01.avi' was named already, for train"),
        ("testlist01.txt, line 3", f"{pushups}_g08_c01.avi' lies in no class of classInd.txt"),
        ("YoYo/\\udce9.avi", "testlist01.txt names it, but it is not there"),
        ("testlist01.txt, line 6", "'x.avi' lies in no class of classInd.txt"),
    )
    assert listing.unlisted == (names[0], names[2])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("classInd.txt", "ApplyEyeMakeup\n", r"none of the 5 entries .*classInd\.txt, line 1: is not a number"),
        ("more/classInd.txt", "", "more than once"),
    ],
)
def test_unusable_lists_of_ucf101_are_refused(tmp_path, name, content, message):
    write_files(tmp_path, UCF101 | {f"ucfTrainTestlist/{name}": content})
    with pytest.raises(UserError, match=message):
        list_clips(tmp_path)


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ("ApplyEyeMakeup", "apply eye makeup"),
        ("YoYo", "yo yo"),
        ("TaiChi", "tai chi"),
        ("HandstandPushups", "handstand pushups"),
        ("Archery", "archery"),
        ("CleanAndJerk", "clean and jerk"),
        ("TVShow", "tv show"),
    ],
)
def test_class_names_become_phrases(label, text):
    assert format_class_name(label) == text


def annotations(videos: list[tuple[str, str]], sentences: list[tuple[str, str]]) -> str:
    return json.dumps(
        {
            "info": {"year": "2016"},
            "videos": [
                {"video_id": v, "split": s, "category": 9, "url": "…", "start time": 1.5, "end time": 9.0, "id": i}
                for i, (v, s) in enumerate(videos)
            ],
            "sentences": [{"video_id": v, "caption": c, "sen_id": i} for i, (v, c) in enumerate(sentences)],
        }
    )


MSRVTT = {
    "TrainValVideo/video0.mp4": b"zero",
    "TrainValVideo/video1.mp4": b"",
    "TestVideo/video7010.mp4": b"test",
    "train_val_annotation/train_val_videodatainfo.json": annotations(
        [("video1", "validate"), ("video0", "train")],
        [("video0", "a car"), ("video1", "a cat"), ("video0", " a car "), ("video0", "a red car"), ("video1", "")],
    ),
    "test_videodatainfo.json": annotations([("video7010", "test")], [("video7010", f"text {i}") for i in range(20)]),
    "category.txt": "music 0",
}


def test_msrvtt_is_listed_with_its_captions(tmp_path):
    write_files(tmp_path, MSRVTT)
    listing = list_clips(tmp_path)
    assert facts(listing) == [
        ("TestVideo/video7010.mp4", tuple(f"text {i}" for i in range(20)), "test"),
        ("TrainValVideo/video1.mp4", ("a cat",), "validation"),
        ("TrainValVideo/video0.mp4", ("a car", "a red car"), "train"),
    ]
    assert (listing.format, listing.unlisted, listing.rejected) == ("msrvtt", (), ())
    assert listing.clips[2].read() == b"zero"


def test_msrvtt_in_several_parts_is_listed(tmp_path):
    everything = annotations(
        [("video0", "train"), ("video1", "train"), ("video2", "test"), ("video3", "test")],
        [("video0", "x"), ("video1", "x" * 100_000), ("video9", "of no video")],
    )
    files = ["videos/all/video0.mp4", "videos/all/video1.mp4", "videos/all/video3.webm", "old/video3.mp4"]
    write_files(tmp_path, {"MSRVTT_data.json": everything} | dict.fromkeys([*files, "video8.mp4", "photo.png"], b""))
    listing = list_clips(tmp_path)
    assert facts(listing) == [("videos/all/video0.mp4", ("x",), "train"), ("old/video3.mp4", (), "test")]
    assert listing.unlisted == ("photo.png", "video8.mp4")
    assert dict(listing.rejected) == {
        "videos/all/video1.mp4": "its caption has 100,000 bytes, 65,536 is the limit",
        "videos/all/video3.webm": "is the same clip of MSR-VTT as 'old/video3.mp4'",
        "video2": "the annotations name it, but it is not there",
        "video9": "has sentences, but is not among the videos",
    }


def test_bad_entries_of_msrvtt_reject_only_themselves(tmp_path):
    more = {
        "videos": [3, {"video_id": "video0"}, {"video_id": "video1", "split": "training"}],
        "sentences": [{"video_id": "video1", "caption": "again"}, {"video_id": "video0", "caption": None}],
    }
    other = annotations([("video0", "test"), ("video2", "train")], [("video2", "Xt")])
    write_files(
        tmp_path,
        MSRVTT
        | {
            "x/videodatainfo_2017.json": json.dumps(more),
            "x/videodatainfo_2018.json": other.encode().replace(b"Xt", b"\xe9t"),
            "video2.mp4": b"",
        },
    )
    listing = list_clips(tmp_path)
    assert facts(listing)[1:] == [
        ("TrainValVideo/video1.mp4", ("a cat", "again"), "validation"),
        ("TrainValVideo/video0.mp4", ("a car", "a red car"), "train"),
    ]
    assert listing.rejected == (
        ("videodatainfo_2017.json, videos[0]", "has no text 'video_id'"),
        ("videodatainfo_2017.json, videos[1]", "has no text 'split'"),
        ("videodatainfo_2017.json, videos[2]", "has the split 'training'; it must be train, validate or test"),
        ("videodatainfo_2017.json, sentences[1]", "has no text 'caption'"),
        ("videodatainfo_2018.json, videos[0]", "has 'video0' for test, which was named already for train"),
        ("video2.mp4", "its caption is not UTF-8"),
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not readable JSON"),
        ("[]", "has no list 'videos'"),
        (json.dumps({"images": [], "annotations": []}), "has no list 'videos'; use MSR-VTT's own files"),
    ],
)
def test_unusable_annotations_are_refused(tmp_path, content, message):
    write_files(tmp_path, MSRVTT | {"x/videodatainfo_2017.json": content})
    with pytest.raises(UserError, match=message):
        list_clips(tmp_path)


def test_msrvtt_without_annotations_is_refused(tmp_path):
    write_files(tmp_path, {"video0.mp4": b""})
    with pytest.raises(MissingError, match="holds no annotations of MSR-VTT"):
        list_clips(tmp_path, format="msrvtt")
